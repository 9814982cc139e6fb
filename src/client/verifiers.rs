//! Who may log in, and by which verifier: from the configured users, or asked of the primary.
//!
//! Promises: a user who does not exist, has no password, has one that is not SCRAM, or whose password
//! has expired looks the same from outside: a mock verifier, always with the same salt for the same
//! name in one process. PBKDF2 runs once for each listed user, off the I/O threads. Answers of the
//! nodes are not kept: rights are those of the moment of login, and a question is bounded in time.
//!
//! While the primary does not answer, replicas are asked, which may lag behind a change of password by
//! their replay lag. The proxy's clock decides whether a password has expired.
//!
//! Deliberately not here: the exchange itself ([`super::auth`]), and any cache of questions.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};
use tokio_postgres::types::Type;

use crate::config::{AuthSource, Config, Secret, UserConfig};
use crate::node::Nodes;
use crate::scram::{LoginKeys, Verifier};
use crate::topology::{NodeId, Standing, TopologyHandle};

/// How long one node may take for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an administrator waits for it before what is known is taken.
const ADMIN_ANSWER: Duration = Duration::from_secs(3);
/// How often nodes are asked again while none answers, at least.
const AGAIN: Duration = Duration::from_millis(250);
/// What is left of a login's time for telling the client that nobody could be asked.
const FOR_THE_ANSWER: Duration = Duration::from_secs(1);
/// Nodes asked for one login, at most.
const ASKED: usize = 3;

/// Where verifiers come from. One for the whole proxy.
pub struct Verifiers {
    /// What a node last said of administrators, for when none can be asked: the console is needed most then.
    admins: Mutex<HashMap<String, AuthRow>>,
    /// Makes mock verifiers unpredictable, and the same for the same name.
    secret: [u8; 32],
    source: ArcSwap<Source>,
}

enum Source {
    Listed(HashMap<String, Arc<Listed>>),
    Asked {
        query: String,
        nodes: Arc<Nodes>,
        topology: Arc<TopologyHandle>,
        /// The control user, whose password is known here.
        control: Option<(String, Arc<Listed>)>,
        /// `failover.pause_timeout`: how long a login waits for a node that can be asked.
        patience: Duration,
    },
}

struct Listed {
    password: Secret,
    keys: LoginKeys,
    verifier: OnceCell<Verifier>,
}

impl Listed {
    fn new(user: &UserConfig) -> Arc<Listed> {
        let keys = LoginKeys::password(user.password.clone());
        Arc::new(Listed { password: user.password.clone(), keys, verifier: OnceCell::new() })
    }
}

/// What is known of a user who wants to log in to a database.
#[derive(Clone, Debug)]
pub struct Account {
    /// What the client must prove itself against; a mock when nothing could let it in.
    pub verifier: Verifier,
    /// Why it is a mock, for the log: a client is told no more than that its password is wrong.
    pub unusable: Option<&'static str>,
    /// What logs in to the nodes, where it is known beforehand; else the exchange yields it.
    pub known_keys: Option<LoginKeys>,
    /// `rolcanlogin`.
    pub may_log_in: bool,
    /// Whether the database may be connected to.
    pub database: DatabaseAccess,
}

/// Whether a database may be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseAccess {
    /// It may; or the node is to decide (source `list`).
    Granted,
    /// The role lacks CONNECT.
    Denied,
    /// There is no such database.
    Unknown,
}

/// No verifier can be had now.
#[derive(Debug)]
pub enum VerifierError {
    /// No node that could be asked answered; how the last one failed.
    NoNode(String),
    /// A node answered, but not with what `auth.query` must yield.
    Query(String),
    /// The system gave no random bytes, or the derivation was cut off by the end of the process.
    System(&'static str),
}

impl fmt::Display for VerifierError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerifierError::NoNode(cause) => write!(f, "no node answers auth.query: {cause}"),
            VerifierError::Query(cause) => write!(f, "auth.query failed: {cause}"),
            VerifierError::System(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for VerifierError {}

impl Verifiers {
    /// Nothing is asked or derived yet.
    pub fn new(
        config: &Config,
        nodes: &Arc<Nodes>,
        topology: &Arc<TopologyHandle>,
    ) -> Result<Verifiers, VerifierError> {
        let mut secret = [0; 32];
        SystemRandom::new()
            .fill(&mut secret)
            .map_err(|_| VerifierError::System("no random bytes from the system"))?;
        let nobody = Source::Listed(HashMap::new());
        let verifiers = Verifiers { admins: Mutex::default(), secret, source: ArcSwap::from_pointee(nobody) };
        verifiers.follow(config, nodes, topology);
        Ok(verifiers)
    }

    /// Logins to come go by `config`. Who is listed with the password of before keeps what was derived from it.
    pub fn follow(&self, config: &Config, nodes: &Arc<Nodes>, topology: &Arc<TopologyHandle>) {
        let source = match config.auth.source {
            AuthSource::Query => Source::Asked {
                query: config.auth.query.clone(),
                nodes: Arc::clone(nodes),
                topology: Arc::clone(topology),
                control: config.control.password.clone().map(|password| {
                    let name = config.control.user.clone();
                    (name.clone(), Listed::new(&UserConfig { name, password }))
                }),
                patience: config.failover.pause_timeout,
            },
            AuthSource::List => {
                let before = self.source.load();
                let known = |user: &UserConfig| match &**before {
                    Source::Listed(users) => users.get(&user.name).filter(|l| l.password == user.password),
                    Source::Asked { .. } => None,
                };
                let listed = |user: &UserConfig| known(user).cloned().unwrap_or_else(|| Listed::new(user));
                let users = config.auth.users.iter();
                Source::Listed(users.map(|user| (user.name.clone(), listed(user))).collect())
            }
        };
        self.admins().retain(|name, _| config.auth.admins.contains(name));
        self.source.store(Arc::new(source));
    }

    /// One listed user, without a configuration around it.
    #[cfg(test)]
    pub(crate) fn of_one(user: &str, password: &str) -> Verifiers {
        let listed =
            Listed::new(&UserConfig { name: user.to_owned(), password: Secret(password.to_owned()) });
        let source = Source::Listed(HashMap::from([(user.to_owned(), listed)]));
        Verifiers { admins: Mutex::default(), secret: [3; 32], source: ArcSwap::from_pointee(source) }
    }

    /// What is known of `user` and its right to `database`.
    pub async fn look_up(&self, user: &str, database: &str) -> Result<Account, VerifierError> {
        match &*self.source.load_full() {
            Source::Listed(users) => match users.get(user) {
                Some(listed) => self.listed(user, listed).await,
                None => Ok(self.nobody(user)),
            },
            Source::Asked { query, nodes, topology, .. } => {
                let row = ask_nodes(query, nodes, topology, user, database).await?;
                Ok(match row {
                    Some(row) => self.account(user, row, SystemTime::now()),
                    None => self.nobody(user),
                })
            }
        }
    }

    /// The same for a login that is to be over at `deadline`: while no node can be asked (the primary restarts, or a
    /// failover is underway), it waits for one as long as a statement waits for a primary.
    pub async fn look_up_in_time(
        &self,
        user: &str,
        database: &str,
        deadline: Instant,
    ) -> Result<Account, VerifierError> {
        let (topology, patience) = match &*self.source.load_full() {
            Source::Listed(_) => return self.look_up(user, database).await,
            Source::Asked { topology, patience, .. } => (Arc::clone(topology), *patience),
        };
        let begun = Instant::now();
        let last = deadline.checked_sub(FOR_THE_ANSWER).unwrap_or(begun);
        loop {
            let changed = topology.changed();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let failed = match timeout_at(last, self.look_up(user, database)).await {
                Ok(Err(error @ VerifierError::NoNode(_))) => error,
                Ok(outcome) => return outcome,
                Err(_) => return Err(VerifierError::NoNode("no answer in time".to_owned())),
            };
            let now = Instant::now();
            let until = (begun + patience).min(last);
            if now >= until {
                return Err(failed);
            }
            let _ = timeout_at(until.min(now + AGAIN), changed).await;
        }
    }

    fn admins(&self) -> MutexGuard<'_, HashMap<String, AuthRow>> {
        self.admins.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// What is known of an administrator who wants to log in to the console. While no node can be asked: what one
    /// said at the last login, or the password of the control user.
    pub async fn look_up_admin(&self, user: &str, database: &str) -> Result<Account, VerifierError> {
        let Source::Asked { query, nodes, topology, control, .. } = &*self.source.load_full() else {
            return self.look_up(user, database).await;
        };
        let asked = ask_nodes(query, nodes, topology, user, database);
        let failed = match tokio::time::timeout(ADMIN_ANSWER, asked).await {
            Ok(Ok(Some(row))) => {
                self.admins().insert(user.to_owned(), row.clone());
                return Ok(self.account(user, row, SystemTime::now()));
            }
            Ok(Ok(None)) => {
                self.admins().remove(user);
                return Ok(self.nobody(user));
            }
            Ok(Err(error)) => error,
            Err(_) => VerifierError::NoNode("no answer in time".to_owned()),
        };
        let remembered = self.admins().get(user).cloned();
        match (remembered, control) {
            (Some(row), _) => Ok(self.account(user, row, SystemTime::now())),
            (None, Some((name, listed))) if name == user => self.listed(user, listed).await,
            (None, _) => Err(failed),
        }
    }

    async fn listed(&self, user: &str, listed: &Listed) -> Result<Account, VerifierError> {
        let derive = || async {
            let (password, user, secret) = (listed.password.clone(), user.to_owned(), self.secret);
            tokio::task::spawn_blocking(move || Verifier::from_password(&password.0, &user, &secret))
                .await
                .map_err(|_| VerifierError::System("the key derivation was cut off"))
        };
        Ok(Account {
            verifier: listed.verifier.get_or_try_init(derive).await?.clone(),
            unusable: None,
            // The keys of this exchange belong to our own salt; only the password fits the nodes'.
            known_keys: Some(listed.keys.clone()),
            may_log_in: true,
            database: DatabaseAccess::Granted,
        })
    }

    fn nobody(&self, user: &str) -> Account {
        Account {
            verifier: Verifier::mock(user, &self.secret),
            unusable: Some("there is no such role, or auth leaves it out"),
            known_keys: None,
            may_log_in: true,
            database: DatabaseAccess::Granted,
        }
    }

    fn account(&self, user: &str, row: AuthRow, now: SystemTime) -> Account {
        let expired = row.valid_until.is_some_and(|until| until < now);
        let verifier = row.verifier.as_deref().filter(|_| !expired).and_then(Verifier::parse);
        let unusable = match &row.verifier {
            _ if verifier.is_some() => None,
            None => Some("the role has no password"),
            Some(_) if expired => Some("the password has expired"),
            Some(_) => Some(
                "the password is not stored as a SCRAM verifier: set it anew with password_encryption = 'scram-sha-256'",
            ),
        };
        Account {
            verifier: verifier.unwrap_or_else(|| Verifier::mock(user, &self.secret)),
            unusable,
            known_keys: None,
            // A null says neither yes nor no: closed.
            may_log_in: row.may_log_in.unwrap_or(false),
            database: match row.may_connect {
                Some(true) => DatabaseAccess::Granted,
                Some(false) => DatabaseAccess::Denied,
                None => DatabaseAccess::Unknown,
            },
        }
    }
}

/// One answer of `auth.query`.
#[derive(Clone)]
struct AuthRow {
    /// `rolpassword`; null: no password.
    verifier: Option<String>,
    /// `rolcanlogin`.
    may_log_in: Option<bool>,
    /// `rolvaliduntil`; null: for ever.
    valid_until: Option<SystemTime>,
    /// CONNECT on the database; null: there is no such database.
    may_connect: Option<bool>,
}

/// Why one node gave no row.
enum AskError {
    /// It could not be asked: another may answer.
    Away(String),
    /// It answered with an error, which another would give too.
    Answered(String),
}

async fn ask_nodes(
    query: &str,
    nodes: &Nodes,
    topology: &TopologyHandle,
    user: &str,
    database: &str,
) -> Result<Option<AuthRow>, VerifierError> {
    let mut last = "no primary and no replica is known".to_owned();
    for node in whom_to_ask(topology) {
        let attempt = async {
            let client = nodes
                .client(node, &nodes.control_database())
                .await
                .map_err(|error| AskError::Away(format!("{}: {}", error.node, error.cause)))?;
            ask(&client, query, user, database).await
        };
        match tokio::time::timeout(ANSWER, attempt).await {
            Ok(Ok(row)) => return Ok(row),
            Ok(Err(AskError::Answered(cause))) => return Err(VerifierError::Query(cause)),
            Ok(Err(AskError::Away(cause))) => last = cause,
            Err(_) => last = "no answer in time".to_owned(),
        }
    }
    Err(VerifierError::NoNode(last))
}

/// The primary first (last when its probes fail), then replicas, the freshest first.
fn whom_to_ask(topology: &TopologyHandle) -> Vec<NodeId> {
    let topology = topology.load();
    let mut found: Vec<_> = topology
        .nodes
        .iter()
        .filter_map(|node| {
            let rank = match &node.standing {
                Standing::Primary { reachable: true } => (0, 0),
                Standing::Replica => (1, node.replay_lag_bytes.unwrap_or(u64::MAX)),
                Standing::Primary { reachable: false } => (2, 0),
                Standing::Excluded(_) => return None,
            };
            Some((rank, node.id))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, id)| id).take(ASKED).collect()
}

/// Asks one node. Both parameters are text, so that one round trip does.
async fn ask(
    client: &tokio_postgres::Client,
    query: &str,
    user: &str,
    database: &str,
) -> Result<Option<AuthRow>, AskError> {
    let rows = client.query_typed(query, &[(&user, Type::TEXT), (&database, Type::TEXT)]).await;
    let rows = rows.map_err(|error| match error.as_db_error() {
        // 57P01 to 57P03: the server is going down or coming up.
        Some(answer) if !answer.code().code().starts_with("57P") => AskError::Answered(answer.to_string()),
        _ => AskError::Away(error.to_string()),
    })?;
    let [row] = rows.as_slice() else {
        if rows.is_empty() {
            return Ok(None);
        }
        return Err(AskError::Answered("more than one row".to_owned()));
    };
    if row.len() < 4 {
        return Err(AskError::Answered("less than four columns".to_owned()));
    }
    let wrong = |error: tokio_postgres::Error| AskError::Answered(error.to_string());
    Ok(Some(AuthRow {
        verifier: row.try_get(0).map_err(wrong)?,
        may_log_in: row.try_get(1).map_err(wrong)?,
        valid_until: row.try_get(2).map_err(wrong)?,
        may_connect: row.try_get(3).map_err(wrong)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Epoch, Exclusion, NodeView, Topology};

    const GOOD: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    fn row() -> AuthRow {
        AuthRow {
            verifier: Some(GOOD.to_owned()),
            may_log_in: Some(true),
            valid_until: None,
            may_connect: Some(true),
        }
    }

    #[test]
    fn only_a_valid_scram_verifier_lets_anybody_in() {
        let verifiers = Verifiers {
            admins: Mutex::default(),
            secret: [1; 32],
            source: ArcSwap::from_pointee(Source::Listed(HashMap::new())),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let is_mock = |row: AuthRow| verifiers.account("app", row, now).verifier.is_mock();
        assert!(!is_mock(row()));
        assert!(!is_mock(AuthRow { valid_until: Some(now + Duration::from_secs(1)), ..row() }));
        assert!(is_mock(AuthRow { valid_until: Some(now - Duration::from_secs(1)), ..row() }));
        assert!(is_mock(AuthRow { verifier: None, ..row() }));
        assert!(is_mock(AuthRow {
            verifier: Some("md5e0cd8f0e1ff4ae1b5de6e3f5b8a1b5f1".to_owned()),
            ..row()
        }));
    }

    #[test]
    fn a_null_never_opens_anything() {
        let verifiers = Verifiers {
            admins: Mutex::default(),
            secret: [1; 32],
            source: ArcSwap::from_pointee(Source::Listed(HashMap::new())),
        };
        let account = |row| verifiers.account("app", row, SystemTime::UNIX_EPOCH);
        assert!(!account(AuthRow { may_log_in: None, ..row() }).may_log_in);
        assert_eq!(account(AuthRow { may_connect: None, ..row() }).database, DatabaseAccess::Unknown);
        assert_eq!(account(AuthRow { may_connect: Some(false), ..row() }).database, DatabaseAccess::Denied);
        assert_eq!(account(row()).database, DatabaseAccess::Granted);
    }

    #[test]
    fn the_primary_is_asked_first_and_excluded_nodes_never() {
        let check = |standings: [Standing; 3], expected: &[u16]| {
            let nodes = standings
                .into_iter()
                .enumerate()
                .map(|(index, standing)| NodeView {
                    id: NodeId(index as u16),
                    name: "n".into(),
                    weight: 1,
                    zone: None,
                    standing,
                    timeline: None,
                    replay_lag_bytes: Some(100 - index as u64),
                    replay_lag: None,
                    server_major: None,
                    recovery: None,
                    replay_rate: None,
                    catch_up: None,
                })
                .collect();
            let topology = Topology {
                epoch: Epoch(1),
                system_identifier: None,
                primary: None,
                timeline: None,
                nodes,
                start: None,
                history: None,
                switches: vec![],
            };
            let found = whom_to_ask(&TopologyHandle::new(topology));
            assert_eq!(found, expected.iter().map(|&id| NodeId(id)).collect::<Vec<_>>());
        };
        let primary = |reachable| Standing::Primary { reachable };
        let away = Standing::Excluded(Exclusion::NotProbed);
        check([Standing::Replica, Standing::Replica, primary(true)], &[2, 1, 0]);
        check([primary(false), Standing::Replica, Standing::Replica], &[2, 1, 0]);
        check([away.clone(), Standing::Replica, away], &[1]);
    }
}
