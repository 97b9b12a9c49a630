//! Why a snapshot was refused or failed, as a word that programs can rely on.

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal,)+) => {
        /// Stable reason code. The word never changes its meaning; new ones may be added.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[doc = $doc])+ #[serde(rename = $word)] $name,)+
        }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The word that logs, reports and JSON carry.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// Whether it says that a snapshot's limits could not be kept, for which it was given up.
            #[must_use]
            pub const fn is_given_up(self) -> bool {
                matches!(
                    self,
                    Self::BufferForecast | Self::StallLimit | Self::CpuFloor | Self::Deadline
                )
            }

            /// What it means, in one sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    // The host.
    /// The kernel lacks a userfaultfd feature that is needed.
    KernelUnfit = "kernel_unfit",
    /// A privilege is missing.
    MissingPrivilege = "missing_privilege",
    /// The destination has too little free space for the forecast size.
    NoSpace = "no_space",
    /// The destination exists already or cannot be written.
    BadDestination = "bad_destination",
    // The virtual machine, before anything is touched.
    /// The process behind the QMP socket could not be found or is not the VMM.
    NoProcess = "no_process",
    /// QEMU is too old for mapped-ram files, which came with 9.0.
    QemuTooOld = "qemu_too_old",
    /// Kernel same-page merging works on guest RAM and would drop its protection.
    Ksm = "ksm",
    /// A balloon or free page reporting could discard guest pages.
    Balloon = "balloon",
    /// Another process has guest RAM mapped writable, as a vhost-user back end does.
    SharedMemory = "shared_memory",
    /// A device assigned by VFIO writes to guest RAM past the CPU's page tables.
    Vfio = "vfio",
    /// The guest's memory is encrypted.
    Encrypted = "encrypted",
    /// A device or option forbids migration, and so its state cannot be saved.
    NotMigratable = "not_migratable",
    /// A migration or another snapshot is active.
    MigrationActive = "migration_active",
    /// Another userfaultfd covers guest RAM.
    ForeignUserfaultfd = "foreign_userfaultfd",
    /// Guest RAM is backed by a file whose file system cannot be write-protected.
    FileBackedRam = "file_backed_ram",
    /// Guest RAM uses huge pages that are too large to be copied while a virtual CPU waits.
    HugePageSize = "huge_page_size",
    /// A disk cannot be snapshotted as it is configured.
    DiskUnfit = "disk_unfit",
    /// The virtual machine is in a state that cannot be snapshotted.
    BadRunState = "bad_run_state",
    // While it runs.
    /// The VMM's control socket was silent past the time limit, closed, or talked nonsense.
    VmmUnreachable = "vmm_unreachable",
    /// The VMM refused a command.
    VmmRefused = "vmm_refused",
    /// The VMM's process ended.
    VmmDied = "vmm_died",
    /// The userfaultfd could not be created inside the VMM.
    AttachFailed = "attach_failed",
    /// The pause took longer than its limit.
    PauseTooLong = "pause_too_long",
    /// Pages were discarded before they were saved.
    PagesDiscarded = "pages_discarded",
    /// Pages lost their write protection before they were saved.
    ProtectionLost = "protection_lost",
    /// Guest memory could not be read or protected.
    Memory = "memory",
    /// The destination reported an I/O error.
    Io = "io",
    /// The operator cancelled it.
    Cancelled = "cancelled",
    /// The daemon that had it taken ended.
    DaemonRestart = "daemon_restart",
    // Given up by the controller, because the policy's limits could not be kept.
    /// The copy buffer was forecast to overflow even with the least CPU time that the guest must be left.
    BufferForecast = "buffer_forecast",
    /// The guest's writes waited longer than allowed even with the least CPU time that it must be left.
    StallLimit = "stall_limit",
    /// The guest got less CPU time than it must be left, because its writes waited for room in the copy buffer.
    CpuFloor = "cpu_floor",
    /// The destination is too slow for the deadline.
    Deadline = "deadline",
    // Reading a snapshot.
    /// The directory holds no complete snapshot.
    NotASnapshot = "not_a_snapshot",
    /// The snapshot's content does not match its checksums or structure.
    Corrupt = "corrupt",
    /// The virtual machine to restore into does not match the snapshot.
    Mismatch = "mismatch",
    /// An argument is not usable.
    BadArgument = "bad_argument",
    /// livesnap itself failed.
    Internal = "internal",
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
