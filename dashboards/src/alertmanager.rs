//! An example of Alertmanager's configuration: who is told of what, and what is not told because something else was.

/// A cause whose alert silences those of its effects.
struct Inhibition {
    cause: &'static str,
    /// What it brings about; empty for all alerts of livesnap.
    effects: &'static [&'static str],
    /// What both must have in common.
    equal: &'static [&'static str],
}

/// So that one cause pages once.
const INHIBITIONS: &[Inhibition] = &[
    Inhibition { cause: "TargetDown", effects: &[], equal: &["job", "instance"] },
    Inhibition {
        cause: "AbortBudgetBurn",
        effects: &["SnapshotAborted", "SnapshotOverdue"],
        equal: &["job", "instance", "vm"],
    },
    Inhibition {
        cause: "SnapshotStuck",
        effects: &["GuestStallHigh", "BufferNearLimit", "SnapshotOverdue"],
        equal: &["job", "instance", "vm"],
    },
    Inhibition {
        cause: "BufferNearLimit",
        effects: &["GuestStallHigh"],
        equal: &["job", "instance", "vm"],
    },
];

/// Who is told of critical alerts.
pub const PAGE: &str = "livesnap-page";
/// Who is told of warnings.
pub const TICKET: &str = "livesnap-ticket";

/// The file.
#[must_use]
pub fn file() -> String {
    let inhibitions: String = INHIBITIONS.iter().map(Inhibition::yaml).collect();
    format!(
        "# {}
# An example: put your own receivers in place of the webhooks.
route:
  receiver: nobody
  routes:
    - matchers: ['service=\"livesnap\"']
      receiver: {TICKET}
      # One message for each cause, not for each virtual machine of a host that is down.
      group_by: [alertname, job, instance]
      group_wait: 5s
      group_interval: 10s
      repeat_interval: 12h
      routes:
        - matchers: ['severity=\"critical\"']
          receiver: {PAGE}
          repeat_interval: 1h

receivers:
  - name: nobody
  - name: {PAGE}
    webhook_configs:
      - url: http://127.0.0.1:9099/page
        send_resolved: true
  - name: {TICKET}
    webhook_configs:
      - url: http://127.0.0.1:9099/ticket
        send_resolved: true

# One cause is told once.
inhibit_rules:
{inhibitions}",
        crate::WRITTEN
    )
}

impl Inhibition {
    fn yaml(&self) -> String {
        let effects = if self.effects.is_empty() {
            // An alert never inhibits itself.
            format!("'service=\"livesnap\"', 'alertname!=\"{}\"'", self.cause)
        } else {
            format!("'alertname=~\"{}\"'", self.effects.join("|"))
        };
        format!(
            "  - source_matchers: ['alertname=\"{}\"', 'service=\"livesnap\"']\n    target_matchers: [{effects}]\n    equal: [{}]\n",
            self.cause,
            self.equal.join(", ")
        )
    }
}
