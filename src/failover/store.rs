//! What a failover must not forget, on disk: the record of what was decided, and how each standby was
//! configured before it was severed.
//!
//! Promises: what [`Store::write`] returned for is there after a crash of the process or of the machine; a
//! crash in the middle leaves the record before; one proxy at a time has the directory (a lock that ends with
//! its process); damaged content is refused, never guessed at. Deliberately knows nothing of what the record
//! says: it is a text.
//!
//! A *failpoint* kills the process at a named place, for tests of what the next start makes of it: the
//! environment variable `HIGHWATER_FAILPOINT` names it, and only debug builds look (see [`failpoint`]).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::failover::coordination::Leave;

/// The first line of each file; a later version of the format has another number.
const HEADER: &str = "highwater failover 1";
const RECORD: &str = "failover.state";
const UPSTREAMS: &str = "upstreams.state";
const LOCK: &str = "lock";
/// No record is longer: a file that is was not written by us.
const MAX_BYTES: u64 = 4 << 20;

/// The directory cannot be used.
#[derive(Debug)]
pub enum StoreError {
    /// Another process has it.
    Locked(PathBuf),
    /// A file is not what was written: which, and what is wrong.
    Damaged(PathBuf, String),
    /// What was tried, where, and the system's answer.
    System(&'static str, PathBuf, io::Error),
    /// It could not be written to etcd.
    Etcd(String),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Locked(path) => {
                write!(
                    f,
                    "{} is in use by another highwater: each needs a state_dir of its own",
                    path.display()
                )
            }
            StoreError::Damaged(path, what) => write!(
                f,
                "{} is damaged ({what}): restore it, or move it away once no failover is under way",
                path.display()
            ),
            StoreError::System(what, path, error) => write!(f, "cannot {what} {}: {error}", path.display()),
            StoreError::Etcd(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            StoreError::System(_, _, error) => Some(error),
            _ => None,
        }
    }
}

/// The directory, for as long as this value lives.
pub struct Store {
    directory: PathBuf,
    upstreams: Arc<Upstreams>,
    _lock: Flock<File>,
}

impl Store {
    /// Makes the directory if need be (readable by nobody else), locks it and reads the record; `None`:
    /// nothing has been recorded yet.
    pub fn open(directory: &Path) -> Result<(Store, Option<String>), StoreError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|error| StoreError::System("make", directory.to_owned(), error))?;
        let path = directory.join(LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(|error| StoreError::System("open", path.clone(), error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => StoreError::Locked(directory.to_owned()),
            other => StoreError::System("lock", path, other.into()),
        })?;
        let record = read(&directory.join(RECORD))?;
        let upstreams = Arc::new(Upstreams::read(directory.join(UPSTREAMS))?);
        Ok((Store { directory: directory.to_owned(), upstreams, _lock: lock }, record))
    }

    /// Replaces the record. When this returns it is durable; after an error either record may be found there by the next
    /// start. Blocks for as long as the disk takes.
    pub fn write(&self, record: &str) -> Result<(), StoreError> {
        failpoint("record_before");
        write(&self.directory.join(RECORD), record)?;
        failpoint("record_after");
        Ok(())
    }

    /// How standbys were configured before they were severed.
    pub fn upstreams(&self) -> Arc<Upstreams> {
        Arc::clone(&self.upstreams)
    }
}

/// What tells the proxy of this directory from every other: the `application_name` of the sessions that give its
/// orders. It is the same after a restart.
pub fn identity(directory: &Path) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let path = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    format!("highwater control {}", checksum(&format!("{}:{}", host.trim(), path.display())))
}

/// The same where several proxies give them, one at a time: one for all of them. `None`: nothing is kept, and no orders
/// are given.
pub fn order_identity(config: &Config) -> Option<String> {
    match (&config.failover.coordination, &config.failover.state_dir) {
        (Some(several), _) => Some(format!("highwater control {}", checksum(&several.prefix))),
        (None, directory) => directory.as_deref().map(identity),
    }
}

/// A setting as it was.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its value.
    pub value: String,
    /// Whether `ALTER SYSTEM` had set it; else a reset brings the value back.
    pub altered: bool,
}

/// How a standby followed its upstream. It may hold a password, so that it has no `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// `primary_conninfo`.
    pub conninfo: Setting,
    /// `wal_receiver_status_interval`.
    pub status_interval: Setting,
    /// `recovery_min_apply_delay`.
    pub apply_delay: Setting,
    /// Whether replay had been paused.
    pub paused: bool,
}

/// What the severed standbys had, by the node's name, durably: the value is gone from the node itself. The file
/// is readable by its owner only, as a `primary_conninfo` may hold a password.
pub struct Upstreams {
    place: Place,
    known: Mutex<BTreeMap<String, Upstream>>,
}

/// Where they are kept.
enum Place {
    /// All in one file.
    File(PathBuf),
    /// Each under a key of its own.
    Etcd(Leave),
}

impl Upstreams {
    fn read(path: PathBuf) -> Result<Upstreams, StoreError> {
        let known = match read(&path)? {
            None => BTreeMap::new(),
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| StoreError::Damaged(path.clone(), error.to_string()))?,
        };
        Ok(Upstreams { place: Place::File(path), known: Mutex::new(known) })
    }

    /// Kept in etcd, where they were found as `values` by node.
    pub fn of_term(leave: Leave, values: &[(String, String)]) -> Result<Upstreams, StoreError> {
        let mut known = BTreeMap::new();
        for (node, value) in values {
            let upstream = serde_json::from_str(value)
                .map_err(|error| StoreError::Etcd(format!("what is kept of {node} is damaged: {error}")))?;
            known.insert(node.clone(), upstream);
        }
        Ok(Upstreams { place: Place::Etcd(leave), known: Mutex::new(known) })
    }

    /// What `node` had.
    pub fn get(&self, node: &str) -> Option<Upstream> {
        self.lock().get(node).cloned()
    }

    /// Keeps what `node` has; durable when this returns. After an error the node must not be severed: an entry that is on
    /// disk all the same says what it still has.
    pub fn keep(&self, node: &str, upstream: Upstream) -> Result<(), StoreError> {
        let mut known = self.lock();
        let mut next = known.clone();
        next.insert(node.to_owned(), upstream);
        self.write(&next, node)?;
        *known = next;
        Ok(())
    }

    /// Forgets `node`: its settings are its own again. After an error that is to be tried again: whether the entry is still
    /// there makes no difference to a node that has what it says.
    pub fn forget(&self, node: &str) -> Result<(), StoreError> {
        let mut known = self.lock();
        if !known.contains_key(node) {
            return Ok(());
        }
        let mut next = known.clone();
        next.remove(node);
        self.write(&next, node)?;
        *known = next;
        Ok(())
    }

    /// All of `next`, in which `node` is what has changed.
    fn write(&self, next: &BTreeMap<String, Upstream>, node: &str) -> Result<(), StoreError> {
        match &self.place {
            Place::File(path) => {
                let text = serde_json::to_string(next)
                    .map_err(|error| StoreError::Damaged(path.clone(), error.to_string()))?;
                write(path, &text)
            }
            Place::Etcd(leave) => {
                let value = next.get(node).map(serde_json::to_string).transpose();
                let value = value.map_err(|error| StoreError::Etcd(error.to_string()))?;
                leave.write(&leave.upstream(node), value).map(drop).map_err(StoreError::Etcd)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Upstream>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn checksum(body: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, body.as_bytes());
    digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write(path: &Path, body: &str) -> Result<(), StoreError> {
    replace(path, body, |directory| File::open(directory)?.sync_all())
}

/// `flush` makes the names in a directory durable.
fn replace(path: &Path, body: &str, flush: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), StoreError> {
    let failed = |what| move |error| StoreError::System(what, path.to_owned(), error);
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(failed("write"))?;
    let text = format!("{HEADER}\nchecksum {}\n{body}", checksum(body));
    file.write_all(text.as_bytes()).map_err(failed("write"))?;
    file.sync_all().map_err(failed("flush"))?;
    failpoint("record_written");
    fs::rename(&beside, path).map_err(failed("replace"))?;
    // The name is in the directory, which has a life of its own on the disk.
    let directory = path.parent().unwrap_or(Path::new("."));
    flush(directory).map_err(failed("flush the directory of"))
}

fn read(path: &Path) -> Result<Option<String>, StoreError> {
    let damaged = |what: &str| Err(StoreError::Damaged(path.to_owned(), what.to_owned()));
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::System("read", path.to_owned(), error)),
        Ok(file) => file,
    };
    let mut bytes = Vec::new();
    let size = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    size.map_err(|error| StoreError::System("read", path.to_owned(), error))?;
    if bytes.len() as u64 > MAX_BYTES {
        return damaged("it is too long");
    }
    let Ok(text) = String::from_utf8(bytes) else { return damaged("it is not text") };
    let Some(rest) = text.strip_prefix(HEADER).and_then(|rest| rest.strip_prefix('\n')) else {
        return damaged("it does not begin as this version writes it");
    };
    let Some((sum, body)) = rest.strip_prefix("checksum ").and_then(|rest| rest.split_once('\n')) else {
        return damaged("it has no checksum");
    };
    if sum != checksum(body) {
        return damaged("its checksum is wrong");
    }
    Ok(Some(body.to_owned()))
}

/// Kills the process, as a power cut would, when `HIGHWATER_FAILPOINT` is `name`, or `name#n` and this is the
/// n-th time that it is passed; or stops it there, with `stop:` before the name. Nothing in release builds.
pub fn failpoint(name: &str) {
    if !cfg!(debug_assertions) {
        return;
    }
    use nix::sys::signal::Signal;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    static WANTED: OnceLock<Option<(Signal, String, AtomicU32)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("HIGHWATER_FAILPOINT").ok()?;
        // Not `abort`: no core file, no handler, nothing flushed.
        let (signal, text) = match text.strip_prefix("stop:") {
            Some(text) => (Signal::SIGSTOP, text),
            None => (Signal::SIGKILL, text.as_str()),
        };
        let (name, count) = text.split_once('#').unwrap_or((text, "1"));
        Some((signal, name.to_owned(), AtomicU32::new(count.parse().ok()?)))
    });
    let Some((signal, wanted, left)) = wanted else { return };
    if wanted == name && left.fetch_sub(1, Ordering::SeqCst) == 1 {
        let _ = nix::sys::signal::raise(*signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(value: &str) -> Setting {
        Setting { value: value.to_owned(), altered: true }
    }

    #[test]
    fn what_was_written_last_is_read_by_the_next() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("made/for/it");
        let (store, before) = Store::open(&directory).unwrap();
        assert_eq!(before, None);
        for text in ["", "epoch 1\n", "epoch 2\nstate promoting b\n"] {
            store.write(text).unwrap();
        }
        let upstream = Upstream {
            conninfo: setting("host=a password='x y'"),
            status_interval: setting("10s"),
            apply_delay: Setting { value: "0".to_owned(), altered: false },
            paused: true,
        };
        store.upstreams().keep("b", upstream.clone()).unwrap();
        store.upstreams().keep("c", upstream.clone()).unwrap();
        store.upstreams().forget("c").unwrap();
        drop(store);
        let (store, record) = Store::open(&directory).unwrap();
        assert_eq!(record.as_deref(), Some("epoch 2\nstate promoting b\n"));
        assert!(store.upstreams().get("b") == Some(upstream));
        assert!(store.upstreams().get("c").is_none());
        use std::os::unix::fs::PermissionsExt as _;
        for file in [RECORD, UPSTREAMS] {
            let mode = fs::metadata(directory.join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{file} is open to others");
        }
    }

    #[test]
    fn a_record_whose_name_could_not_be_flushed_may_be_there_and_the_next_one_takes_its_place() {
        let home = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(home.path()).unwrap();
        store.write("epoch 1\n").unwrap();
        let broken = |_: &Path| Err(io::Error::other("the disk is gone"));
        let error = replace(&home.path().join(RECORD), "epoch 2\n", broken).unwrap_err();
        assert!(error.to_string().starts_with("cannot flush the directory of"), "{error}");
        // As far as this process can see; a power cut may bring the one before back.
        assert_eq!(read(&home.path().join(RECORD)).unwrap().as_deref(), Some("epoch 2\n"));
        store.write("epoch 1\n").unwrap();
        drop(store);
        assert_eq!(Store::open(home.path()).unwrap().1.as_deref(), Some("epoch 1\n"));
    }

    #[test]
    fn a_directory_belongs_to_one_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        let (first, _) = Store::open(home.path()).unwrap();
        assert!(matches!(Store::open(home.path()), Err(StoreError::Locked(_))));
        drop(first);
        Store::open(home.path()).unwrap();
    }

    #[test]
    fn a_damaged_record_is_refused_and_what_a_crash_leaves_beside_it_is_not_read() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(RECORD);
        let (store, _) = Store::open(home.path()).unwrap();
        store.write("epoch 7\n").unwrap();
        drop(store);
        fs::write(path.with_extension("new"), "half a rec").unwrap();
        assert_eq!(Store::open(home.path()).unwrap().1.as_deref(), Some("epoch 7\n"));
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(Store::open(home.path()), Err(StoreError::Damaged(..))), "byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(matches!(Store::open(home.path()), Err(StoreError::Damaged(..))), "cut at {at}");
        }
    }
}
