//! The board between those who change it (the coordinator) and those who look (the page, the exporters), on their own
//! threads; and its document as text, made once for all pages that follow the run.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;

use super::Board;
use crate::page;

/// Between two documents.
pub(super) const PAUSE: Duration = Duration::from_millis(300);

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The board with whoever wants to know that it has changed. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedBoard {
    board: Arc<Mutex<Board>>,
    changed: watch::Sender<u64>,
    told: Arc<tokio::sync::Mutex<Option<Told>>>,
}

/// The board's document, written out.
#[derive(Debug, Clone)]
pub(super) struct Told {
    /// Documents before it.
    number: u64,
    made: Instant,
    /// How often the board had changed, at least.
    pub(super) version: u64,
    pub(super) text: Arc<str>,
    /// Whether the run has ended in it.
    pub(super) last: bool,
}

impl SharedBoard {
    /// Of a board.
    #[must_use]
    pub fn new(board: Board) -> Self {
        let board = Arc::new(Mutex::new(board));
        Self { board, changed: watch::Sender::new(0), told: Arc::default() }
    }

    /// Changes it.
    pub fn change<T>(&self, change: impl FnOnce(&mut Board, f64) -> T) -> T {
        // A board whose change was cut off by a panic is only less right.
        let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut board, unix_now());
        drop(board);
        self.changed.send_modify(|version| *version += 1);
        result
    }

    /// Looks at it.
    pub fn look<T>(&self, look: impl FnOnce(&Board, f64) -> T) -> T {
        look(&self.board.lock().unwrap_or_else(PoisonError::into_inner), unix_now())
    }

    /// For instruments that look by themselves.
    #[must_use]
    pub fn inner(&self) -> &Arc<Mutex<Board>> {
        &self.board
    }

    /// Tells of changes.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A document after the one that was `seen`: at most one is made in [`PAUSE`], however many ask.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub(super) async fn told(&self, seen: Option<&Told>) -> Result<Told, serde_json::Error> {
        let mut told = self.told.lock().await;
        if let Some(last) = &*told {
            let is_new = seen.is_none_or(|seen| seen.number != last.number);
            if is_new && last.made.elapsed() < PAUSE {
                return Ok(last.clone());
            }
            tokio::time::sleep_until(last.made + PAUSE).await;
        }
        let version = *self.changed.borrow();
        let document: page::Document = self.look(|board, now| board.document(now));
        let text = serde_json::to_string(&document)?.into();
        let number = told.as_ref().map_or(0, |last| last.number + 1);
        let last = document.state.status.is_some();
        let new = Told { number, made: Instant::now(), version, text, last };
        Ok(told.insert(new).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::board::Facts;

    #[tokio::test]
    async fn few_documents_are_made_however_many_ask_and_none_misses_a_change() {
        let board = SharedBoard::new(Board::new(Facts::default(), None, 0.0));
        let first = board.told(None).await.unwrap();
        assert!(!first.last && !first.text.contains("something new"));
        board.change(|board, now| board.note(now, "something new"));
        assert!(first.version < *board.changes().borrow(), "whoever has it knows of a newer one");
        let asking = (0..9).map(|_| board.told(Some(&first)));
        let told = futures::future::try_join_all(asking).await.unwrap();
        assert!(told.iter().all(|told| told.version == 1 && told.text.contains("something new")));
        let mut made: Vec<Instant> = told.iter().map(|told| told.made).collect();
        made.insert(0, first.made);
        made.dedup();
        assert!(made.len() < 9, "each has one of its own");
        assert!(made.windows(2).all(|pair| pair[1] - pair[0] >= PAUSE), "{made:?}");
        board.change(|board, now| board.ended(now, 0, "all is done"));
        assert!(board.told(Some(&told[8])).await.unwrap().last);
    }
}
