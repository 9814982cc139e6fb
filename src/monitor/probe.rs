//! Asks a node what it is: a full query round trip with a deadline, since a frozen server still accepts
//! TCP. One task per node; it reports every result to the control loop.
//!
//! Promises: a probe each `failover.check_interval`, and one at once when somebody asks for it or the
//! connection held for it ends (which a killed server's does within milliseconds); results are never
//! dropped, the task waits for the loop to take them. Deliberately does not judge what it finds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep_until, timeout};

use crate::config::live::LiveConfig;
use crate::monitor::ReceivedTimeline;
use crate::node::{NodeClient, NodeError, NodeFailure, Nodes, ProbeAnswer, ProbedRole, Start};
use crate::topology::NodeId;
use crate::wal::{TimelineHistory, TimelineId};

/// The least time between two probes of a node, whoever asks.
const LEAST_GAP: Duration = Duration::from_millis(20);
/// The time between two probes of a node where nobody listens, or that is starting.
const RETRY: Duration = Duration::from_millis(100);

/// What a probe saw of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its answer.
    pub answer: ProbeAnswer,
    /// The timeline it writes or replays; `None`: a replica of which it cannot be known.
    pub timeline: Option<TimelineId>,
    /// Of a node that takes writes: its timeline's history; `None`: it could not be read.
    pub history: Option<TimelineHistory>,
    /// Which start of the server answered.
    pub start: Option<Start>,
}

/// The result of one probe.
#[derive(Clone, Debug)]
pub struct Observation {
    /// The node that was asked.
    pub node: NodeId,
    /// When the question was sent.
    pub asked_at: Instant,
    /// What was seen, or how it failed.
    pub result: Result<Seen, NodeError>,
}

/// Probes `node` until the receiver of `results` is gone.
pub async fn run(
    node: NodeId,
    nodes: Arc<Nodes>,
    config: Arc<LiveConfig>,
    now_please: Arc<Notify>,
    results: mpsc::Sender<Observation>,
) {
    let mut probe = Probe { node, nodes, config, held: None };
    loop {
        let asked_at = Instant::now();
        let result = probe.once().await;
        let interval = probe.config.load().failover.check_interval;
        let pause = match &result {
            // It fails fast, so asking often costs little, and a restart takes a tenth of a second.
            Err(e) if matches!(e.kind, NodeFailure::Refused | NodeFailure::Starting) => interval.min(RETRY),
            _ => interval,
        };
        if results.send(Observation { node, asked_at, result }).await.is_err() {
            return;
        }
        if probe.wait(asked_at + pause, &now_please).await {
            let error = NodeError {
                node: probe.nodes.name(node),
                cause: "it ended an idle session as an administrator told it to".to_owned(),
                kind: NodeFailure::ShuttingDown,
            };
            let observation = Observation { node, asked_at: Instant::now(), result: Err(error) };
            if results.send(observation).await.is_err() {
                return;
            }
        }
    }
}

struct Probe {
    node: NodeId,
    nodes: Arc<Nodes>,
    config: Arc<LiveConfig>,
    held: Option<Held>,
}

struct Held {
    client: NodeClient,
    received: ReceivedTimeline,
    history: Option<(TimelineId, TimelineHistory)>,
}

impl Probe {
    async fn once(&mut self) -> Result<Seen, NodeError> {
        let deadline = self.config.load().failover.check_timeout;
        match timeout(deadline, self.ask(deadline)).await {
            Ok(result) => {
                // An error as answer leaves the connection as it was; nothing else does.
                if matches!(&result, Err(e) if e.kind != NodeFailure::Answered) {
                    self.held = None;
                }
                result
            }
            Err(_) => {
                self.held = None;
                Err(NodeError {
                    node: self.nodes.name(self.node),
                    cause: "no answer in time".to_owned(),
                    kind: NodeFailure::Timeout,
                })
            }
        }
    }

    async fn ask(&mut self, deadline: Duration) -> Result<Seen, NodeError> {
        if let Some(held) = &mut self.held {
            held.client.answer_within(deadline);
            match held.look().await {
                // A broken connection says little by itself: a new one tells refused, starting and well apart.
                Err(error) if error.kind == NodeFailure::Broken => self.held = None,
                result => return result,
            }
        }
        let client = self.nodes.open(self.node, deadline).await?;
        let held = Held { client, received: ReceivedTimeline::default(), history: None };
        self.held.insert(held).look().await
    }

    /// Until the next probe is due, or somebody wants one, or the connection has ended; whether that was ordered.
    async fn wait(&mut self, due: Instant, now_please: &Notify) -> bool {
        let earliest = due.min(Instant::now() + LEAST_GAP);
        let due = sleep_until(due.into());
        let ended = match &mut self.held {
            None => {
                tokio::select! { () = due => {}, () = now_please.notified() => {} }
                None
            }
            Some(held) => tokio::select! {
                () = due => None,
                () = now_please.notified() => None,
                ordered = held.client.ended() => Some(ordered),
            },
        };
        if ended.is_some() {
            self.held = None;
        }
        sleep_until(earliest.into()).await;
        ended == Some(true)
    }
}

impl Held {
    async fn look(&mut self) -> Result<Seen, NodeError> {
        let answer = self.client.probe().await?;
        let (timeline, history) = match &answer.role {
            ProbedRole::Replica { positions, .. } => (self.received.observe(positions), None),
            ProbedRole::Primary { timeline, .. } => {
                let timeline = *timeline;
                if self.history.as_ref().is_none_or(|(of, _)| *of != timeline) {
                    self.history = self.client.timeline_history(timeline).await?.map(|h| (timeline, h));
                }
                (Some(timeline), self.history.as_ref().map(|(_, h)| h.clone()))
            }
        };
        Ok(Seen { answer, timeline, history, start: self.client.start().cloned() })
    }
}
