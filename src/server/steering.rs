//! Between the console and the failover machine: orders one way, its state and its record the other.

use std::time::{Duration, UNIX_EPOCH};

use crate::console::{Items, Order, Past, Steering};
use crate::control::Commands;
use crate::failover::event::Command;

/// The machine behind `commands`, as the console uses it.
pub(super) fn steering(commands: Commands) -> Steering {
    let (status, past) = (commands.clone(), commands.clone());
    Steering {
        give: Box::new(move |order| {
            let commands = commands.clone();
            Box::pin(async move { commands.give(command(order)).await })
        }),
        status: Box::new(move || shown(&status)),
        past: Box::new(move || remembered(&past)),
    }
}

fn command(order: Order) -> Command {
    match order {
        Order::Switchover { to, dry_run, timeout } => Command::Switchover { to, dry_run, timeout },
        Order::Failover { to, allow_data_loss } => Command::Failover { to, allow_data_loss },
        Order::PauseFailover => Command::PauseFailover,
        Order::ResumeFailover => Command::ResumeFailover,
        Order::Fence(node) => Command::Fence(node),
        Order::Unfence(node) => Command::Unfence(node),
        Order::Forget(node) => Command::Forget(node),
        Order::AckRecovery => Command::AckRecovery,
    }
}

fn shown(commands: &Commands) -> Items {
    let status = commands.status();
    let yes = |is: bool| Some(if is { "yes" } else { "no" }.to_owned());
    let since = status.since.elapsed().unwrap_or_default();
    let kept_out: Vec<String> =
        status.quarantined.iter().map(|(node, why)| format!("{node} ({})", why.label())).collect();
    let lost = status.loss.map(|loss| match loss.exact_bytes {
        Some(bytes) => format!("{bytes} bytes"),
        None => format!("{} bytes at least", loss.acked_bytes_min),
    });
    vec![
        ("mode", Some(status.mode.to_owned())),
        ("durability", Some(status.durability.to_owned())),
        ("promises", Some(status.promises.clone())),
        ("state", Some(status.state.to_owned())),
        ("state_for", Some(format!("{}s", since.as_secs()))),
        ("state_about", status.node.clone()),
        ("blocked", status.blocked.as_ref().map(|(word, why)| format!("{word}: {why}"))),
        ("paused", yes(status.paused)),
        ("cooling", yes(status.cooling)),
        ("writes_covered", yes(status.covered)),
        ("quarantined", Some(kept_out.join(", ")).filter(|names| !names.is_empty())),
        ("last_loss", lost),
    ]
}

fn remembered(commands: &Commands) -> Vec<Past> {
    let entry = |entry: &crate::failover::record::Entry| Past {
        epoch: entry.epoch.0,
        at: UNIX_EPOCH + Duration::from_millis(entry.unix_ms),
        from: entry.from,
        to: entry.to,
        planned: entry.planned,
        lost_bytes_min: entry.lost_acked_bytes_min,
        took: Duration::from_millis(entry.took_ms),
    };
    commands.status().history.iter().map(entry).collect()
}
