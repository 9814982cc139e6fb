//! What a login on the primary gives, so that one on a replica gives the same.
//!
//! A replica answers by its own configuration what no role, database or session sets (`TimeZone`, `search_path`...): rows would
//! differ from what one server gives. So what the primary gives to a login is asked there, once for each database, user
//! and set of startup parameters, and goes into the startup packets of logins on replicas. There it is what RESET and
//! DISCARD go back to, and what a reload of the replica's configuration does not touch.
//!
//! Known values may be of the past: of an earlier generation of what logins give, or an earlier primary. They serve only
//! while there is no primary to ask.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::StartupParameters;
use crate::node::RESULT_SETTINGS;
use crate::topology::Epoch;

/// When values were asked: both only rise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Basis {
    /// Whose primary was asked.
    pub epoch: Epoch,
    /// Changes of what logins give before that.
    pub generation: u64,
}

/// What the primary gives to a login.
#[derive(Debug, Default)]
pub struct LoginValues {
    /// Names and values; none: it could not be asked yet.
    pairs: Option<Box<[(String, String)]>>,
    /// It gives something else by now.
    outdated: AtomicBool,
}

impl LoginValues {
    /// Whether connections made with these are to be closed.
    pub fn is_outdated(&self) -> bool {
        self.outdated.load(Ordering::Relaxed)
    }

    /// Whether the primary has said what it gives.
    pub fn are_known(&self) -> bool {
        self.pairs.is_some()
    }

    /// Puts them behind what the client asks for, which the primary has had before it gave them.
    pub fn add_to(&self, parameters: &mut Vec<(String, String)>) {
        for (name, value) in self.pairs.iter().flatten() {
            parameters.retain(|(asked, _)| !asked.eq_ignore_ascii_case(name));
            parameters.push((name.clone(), value.clone()));
        }
    }
}

/// Startup parameter sets whose values are kept though no connection has been made with them.
const MOST: usize = 64;

/// What the primary gives to logins of one user to one database, by startup parameters. What connections were made with
/// stays as long as they do: their number is bounded, so this is.
#[derive(Debug, Default)]
pub struct LoginDefaults {
    known: Mutex<HashMap<Arc<StartupParameters>, Known>>,
    /// Since when nobody of the primary could be asked.
    in_vain: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Known {
    /// None: never asked.
    basis: Option<Basis>,
    values: Arc<LoginValues>,
}

impl LoginDefaults {
    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<StartupParameters>, Known>> {
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What was asked on this basis, or a later one.
    pub fn asked_on(&self, startup: &StartupParameters, basis: Basis) -> Option<Arc<LoginValues>> {
        let known = self.lock();
        let known = known.get(startup)?;
        (known.basis >= Some(basis)).then(|| known.values.clone())
    }

    /// What was known last, whenever that was.
    pub fn last_known(&self, startup: &Arc<StartupParameters>) -> Arc<LoginValues> {
        let mut all = self.lock();
        LoginDefaults::make_room(&mut all);
        let never = || Known { basis: None, values: Arc::default() };
        all.entry(startup.clone()).or_insert_with(never).values.clone()
    }

    /// The primary has said what it gives: the values of [`RESULT_SETTINGS`], in that order.
    pub fn learn(&self, startup: &Arc<StartupParameters>, basis: Basis, said: Vec<Option<Vec<u8>>>) {
        let named = RESULT_SETTINGS.iter().zip(said);
        let pairs = named.filter_map(|(name, value)| {
            let value = String::from_utf8(value?).ok()?;
            // A startup packet is read in no client's encoding.
            value.is_ascii().then(|| ((*name).to_owned(), value))
        });
        let pairs = Some(pairs.collect());
        let mut all = self.lock();
        LoginDefaults::make_room(&mut all);
        match all.get_mut(startup) {
            Some(known) if known.basis > Some(basis) => {}
            Some(known) if known.values.pairs == pairs => known.basis = Some(basis),
            other => {
                if let Some(known) = other {
                    known.values.outdated.store(true, Ordering::Relaxed);
                }
                let values = Arc::new(LoginValues { pairs, outdated: AtomicBool::new(false) });
                all.insert(startup.clone(), Known { basis: Some(basis), values });
            }
        }
    }

    /// Whether a login on a replica may wait for somebody of the primary who can be asked: not again and again, while all
    /// are at work.
    pub fn may_wait(&self, now: Instant) -> bool {
        let in_vain = *self.in_vain.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        in_vain.is_none_or(|since| now.saturating_duration_since(since) >= NOT_AGAIN_FOR)
    }

    /// It has waited in vain.
    pub fn waited_in_vain(&self, now: Instant) {
        *self.in_vain.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(now);
    }

    fn make_room(all: &mut HashMap<Arc<StartupParameters>, Known>) {
        if all.len() >= MOST {
            all.retain(|_, known| Arc::strong_count(&known.values) > 1);
        }
    }
}

/// How long what was in vain is not tried again.
const NOT_AGAIN_FOR: Duration = Duration::from_secs(10);
/// How long a login on a replica waits for somebody of the primary who can be asked.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// With which values one replica has refused a login of late: it lacks a locale, say. Its reads go elsewhere.
#[derive(Debug, Default)]
pub struct RefusedValues(Mutex<Option<(Arc<LoginValues>, Instant)>>);

impl RefusedValues {
    /// Whether a login with these is not worth a try at `now`.
    pub fn holds(&self, values: &Arc<LoginValues>, now: Instant) -> bool {
        let refused = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        matches!(&*refused, Some((those, since)) if Arc::ptr_eq(those, values)
            && now.saturating_duration_since(*since) < NOT_AGAIN_FOR)
    }

    /// A login was refused at `now`, with this SQLSTATE. Whether that was because of the values.
    pub fn note(&self, values: &Arc<LoginValues>, sqlstate: [u8; 5], now: Instant) -> bool {
        // A value that is not valid there; a name that is not known there.
        let theirs = values.are_known() && matches!(&sqlstate, b"22023" | b"42704");
        if theirs {
            let mut refused = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *refused = Some((values.clone(), now));
        }
        theirs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLY: Basis = Basis { epoch: Epoch(1), generation: 0 };
    const LATE: Basis = Basis { epoch: Epoch(1), generation: 1 };

    fn said(zone: &str) -> Vec<Option<Vec<u8>>> {
        let value = |name: &&str| (*name == "TimeZone").then(|| zone.as_bytes().to_vec());
        RESULT_SETTINGS.iter().map(value).collect()
    }

    fn startup(name: &str) -> Arc<StartupParameters> {
        Arc::new(StartupParameters(vec![("timezone".to_owned(), name.to_owned())]))
    }

    #[test]
    fn connections_made_before_anything_was_known_are_outdated_once_it_is() {
        let defaults = LoginDefaults::default();
        let one = startup("x");
        let unknown = defaults.last_known(&one);
        assert!(!unknown.are_known() && defaults.asked_on(&one, EARLY).is_none());
        defaults.learn(&one, EARLY, said("UTC"));
        assert!(unknown.is_outdated());
        let known = defaults.asked_on(&one, EARLY).unwrap();
        assert!(known.are_known() && !known.is_outdated());
    }

    #[test]
    fn other_values_outdate_the_earlier_ones_and_the_same_do_not() {
        let defaults = LoginDefaults::default();
        let one = startup("x");
        defaults.learn(&one, EARLY, said("UTC"));
        let first = defaults.last_known(&one);
        defaults.learn(&one, LATE, said("UTC"));
        assert!(!first.is_outdated() && defaults.asked_on(&one, LATE).is_some());
        // Somebody who was asked before comes late.
        defaults.learn(&one, EARLY, said("Asia/Tokyo"));
        assert!(!first.is_outdated());
        defaults.learn(&one, LATE, said("Asia/Tokyo"));
        assert!(first.is_outdated());
    }

    #[test]
    fn values_take_the_place_of_what_the_client_asks_for_under_the_same_name() {
        let defaults = LoginDefaults::default();
        let one = startup("x");
        defaults.learn(&one, EARLY, said("UTC"));
        let mut parameters = one.0.clone();
        parameters.push(("options".to_owned(), "-c a.b=c".to_owned()));
        defaults.last_known(&one).add_to(&mut parameters);
        let expected = [("options", "-c a.b=c"), ("TimeZone", "UTC")];
        assert_eq!(parameters, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn who_has_waited_in_vain_does_not_wait_again_at_once() {
        let (defaults, now) = (LoginDefaults::default(), Instant::now());
        assert!(defaults.may_wait(now));
        defaults.waited_in_vain(now);
        assert!(!defaults.may_wait(now) && defaults.may_wait(now + NOT_AGAIN_FOR));
    }

    #[test]
    fn what_nobody_uses_makes_room() {
        let defaults = LoginDefaults::default();
        let used = startup("used");
        let held = defaults.last_known(&used);
        for number in 0..MOST {
            defaults.learn(&startup(&number.to_string()), EARLY, said("UTC"));
        }
        assert!(defaults.lock().len() <= 2, "{}", defaults.lock().len());
        defaults.learn(&used, EARLY, said("UTC"));
        assert!(held.is_outdated());
    }

    #[test]
    fn only_a_refusal_of_the_values_keeps_a_replica_from_being_asked() {
        let (refused, now) = (RefusedValues::default(), Instant::now());
        let values = Arc::new(LoginValues { pairs: Some(Box::default()), outdated: AtomicBool::new(false) });
        assert!(!refused.note(&values, *b"28000", now) && !refused.holds(&values, now));
        assert!(refused.note(&values, *b"22023", now) && refused.holds(&values, now));
        assert!(!refused.holds(&values, now + NOT_AGAIN_FOR));
        assert!(!refused.holds(&Arc::default(), now));
        assert!(!refused.note(&Arc::default(), *b"22023", now), "they were not even sent");
    }
}
