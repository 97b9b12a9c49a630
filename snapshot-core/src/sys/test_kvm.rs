//! A KVM guest for tests: one virtual CPU that writes the first word of each page of its RAM, round and round, with
//! the number of the round. It runs on the thread that calls, page by page.
//!
//! A vCPU's writes go through the processor's second-level page table, which KVM fills, not through that of the
//! process: the protection has to hold in both.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::test_memory::{Kind, TestMemory};

/// Where the guest's code lies in its memory, behind all RAM.
const CODE_AT: u64 = 256 << 20;
/// 32 bits, no paging: `CR0.PE`.
const PROTECTED_MODE: u64 = 1;
/// RFLAGS with nothing but the bit that is always set.
const FLAGS: u64 = 2;

/// The guest.
pub struct KvmGuest {
    // In this order: the memory must outlive the VM.
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: Arc<TestMemory>,
    _code: TestMemory,
}

/// KVM, where there is one; it must be where `REQUIRE_KVM=1`.
pub fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            assert_ne!(std::env::var("REQUIRE_KVM").as_deref(), Ok("1"), "no KVM: {error}");
            eprintln!("SKIPPED: there is no KVM ({error})");
            None
        }
    }
}

impl KvmGuest {
    /// A guest with the RAM `ram`, before its first instruction.
    pub fn new(kvm: &Kvm, ram: Arc<TestMemory>) -> Result<Self, kvm_ioctls::Error> {
        let vm = kvm.create_vm()?;
        let code = TestMemory::map(Kind::Anonymous, 1).unwrap();
        let page_bytes = u32::try_from(ram.kind().page_bytes()).unwrap();
        code.write(&program(page_bytes, u32::try_from(ram.len_bytes()).unwrap()));
        for (slot, (at, memory)) in (0..).zip([(0, &*ram), (CODE_AT, &code)]) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: at,
                memory_size: memory.len_bytes(),
                userspace_addr: memory.address(),
            };
            // SAFETY: the mapping is whole, nothing refers to it but atomics, and it lives as long as the VM.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let vcpu = vm.create_vcpu(0)?;
        let mut registers = vcpu.get_sregs()?;
        registers.cr0 |= PROTECTED_MODE;
        registers.cs = flat_segment(0x8, 0xb);
        for segment in [
            &mut registers.ds,
            &mut registers.es,
            &mut registers.fs,
            &mut registers.gs,
            &mut registers.ss,
        ] {
            *segment = flat_segment(0x10, 0x3);
        }
        vcpu.set_sregs(&registers)?;
        vcpu.set_regs(&kvm_regs { rip: CODE_AT, rbx: 1, rflags: FLAGS, ..Default::default() })?;
        Ok(Self { vcpu, _vm: vm, ram, _code: code })
    }

    /// Its RAM.
    pub fn ram(&self) -> &TestMemory {
        &self.ram
    }

    /// Has it write the next `pages` pages.
    pub fn write_pages(&mut self, pages: usize) {
        for _ in 0..pages {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(..)) => {}
                other => panic!("the virtual CPU stopped with {other:?}"),
            }
        }
    }
}

/// All 4 GiB, of type `kind` as in a descriptor table.
fn flat_segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Machine code, as words.
///
/// ```text
/// round: xor edi, edi
/// page:  mov [edi], ebx
///        out 0x10, al         ends the turn
///        add edi, page_bytes
///        cmp edi, len_bytes
///        jb page
///        inc ebx
///        jmp round
/// ```
fn program(page_bytes: u32, len_bytes: u32) -> [u64; 3] {
    let ([p0, p1, p2, p3], [l0, l1, l2, l3]) = (page_bytes.to_le_bytes(), len_bytes.to_le_bytes());
    [
        [0x31, 0xff, 0x89, 0x1f, 0xe6, 0x10, 0x81, 0xc7],
        [p0, p1, p2, p3, 0x81, 0xff, l0, l1],
        [l2, l3, 0x72, 0xee, 0x43, 0xeb, 0xe9, 0x90],
    ]
    .map(u64::from_le_bytes)
}
