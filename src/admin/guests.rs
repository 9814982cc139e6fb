//! Who is connected to the HTTP port, and who must make room when it is full: whoever has been silent longest. A peer that has
//! sent half a request, or nothing, must not keep a health check from its answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// The connections, of which there are so many at most.
pub(super) struct Guests {
    places: Arc<Semaphore>,
    there: Mutex<Vec<Arc<Guest>>>,
    /// One has had its answer.
    answered: Notify,
}

/// One connection.
struct Guest {
    /// Since when it has been answered, or here; none: it is being answered.
    silent_since: Mutex<Option<Instant>>,
    leave: Notify,
}

/// The place of one connection; dropping it gives it back.
pub(super) struct Seat {
    guests: Arc<Guests>,
    guest: Arc<Guest>,
    _place: OwnedSemaphorePermit,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub(super) fn new(most: usize) -> Arc<Guests> {
        let places = Arc::new(Semaphore::new(most));
        Arc::new(Guests { places, there: Mutex::default(), answered: Notify::new() })
    }

    /// A place, for which whoever has been silent longest has to go if there is none. Only while all are being
    /// answered it is waited for.
    pub(super) async fn seat(self: &Arc<Guests>) -> Seat {
        let place = loop {
            if let Ok(place) = self.places.clone().try_acquire_owned() {
                break place;
            }
            let answered = self.answered.notified();
            self.send_one_away();
            tokio::select! {
                Ok(place) = self.places.clone().acquire_owned() => break place,
                () = answered => {}
            }
        };
        let guest = Arc::new(Guest { silent_since: Mutex::new(Some(Instant::now())), leave: Notify::new() });
        lock(&self.there).push(guest.clone());
        Seat { guests: self.clone(), guest, _place: place }
    }

    fn send_one_away(&self) {
        let there = lock(&self.there);
        let silent = there.iter().filter_map(|guest| Some(((*lock(&guest.silent_since))?, guest)));
        if let Some((_, guest)) = silent.min_by_key(|(since, _)| *since) {
            guest.leave.notify_one();
        }
    }
}

impl Seat {
    /// Resolves when the connection is to be closed for another one.
    pub(super) async fn told_to_leave(&self) {
        self.guest.leave.notified().await;
    }

    /// Runs `answer`, meanwhile nobody sends it away.
    pub(super) fn meanwhile<T>(&self, answer: impl Future<Output = T>) -> impl Future<Output = T> {
        let (guests, guest) = (self.guests.clone(), self.guest.clone());
        async move {
            *lock(&guest.silent_since) = None;
            let answer = answer.await;
            *lock(&guest.silent_since) = Some(Instant::now());
            guests.answered.notify_one();
            answer
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.guests.there).retain(|guest| !Arc::ptr_eq(guest, &self.guest));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What a connection's task does until it has to go.
    fn stay(seat: Seat) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move { seat.told_to_leave().await })
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_been_silent_longest_makes_room() {
        let guests = Guests::new(3);
        let mut seats = Vec::new();
        for _ in 0..3 {
            seats.push(guests.seat().await);
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        // The first one has just had an answer.
        seats[0].meanwhile(async {}).await;
        let mut there: Vec<_> = seats.into_iter().map(stay).collect();
        for goes in [1, 2, 0] {
            tokio::time::advance(Duration::from_millis(1)).await;
            there.push(stay(guests.seat().await));
            let gone: Vec<bool> = there.iter().map(|task| task.is_finished()).collect();
            assert!(gone[goes], "{gone:?}");
        }
        assert_eq!(there.iter().filter(|task| task.is_finished()).count(), 3);
        assert_eq!(lock(&guests.there).len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_being_answered_is_waited_for() {
        let guests = Guests::new(1);
        let seat = guests.seat().await;
        let answered = tokio::spawn(async move {
            seat.meanwhile(tokio::time::sleep(Duration::from_secs(3))).await;
            seat.told_to_leave().await;
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        let begun = Instant::now();
        let _next = guests.seat().await;
        assert_eq!(begun.elapsed(), Duration::from_secs(2));
        assert!(answered.is_finished());
    }
}
