//! Everything that one front-end owns: its connection, memory, queues and the faults it saw.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::connection::Connection;
use crate::error::Error;
use crate::fault::Faults;
use crate::memory::{Memory, Span};
use crate::queue::{Queue, QueueOptions};

/// A front-end; usable from several threads.
#[derive(Default)]
pub struct Kit {
    pub memory: Arc<Memory>,
    pub faults: Arc<Faults>,
    /// Load loops end when this changes.
    pub stop: AtomicU64,
    connection: Mutex<Option<Arc<Connection>>>,
    queues: Mutex<HashMap<u16, Arc<Queue>>>,
    spans: Mutex<HashMap<u64, Span>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Kit {
    /// Takes a connection, or gives up the present one; queues notice its end.
    pub fn set_connection(&self, connection: Option<Connection>) {
        let connection = connection.map(Arc::new);
        for queue in lock(&self.queues).values() {
            queue.set_connection(connection.clone());
        }
        *lock(&self.connection) = connection;
    }

    pub fn connection(&self) -> Result<Arc<Connection>, Error> {
        lock(&self.connection)
            .clone()
            .ok_or_else(|| Error::Invalid("not connected".into()))
    }

    /// Makes queue `index`, in place of an earlier one.
    pub fn add_queue(
        &self,
        index: u16,
        options: QueueOptions,
        base: u16,
    ) -> Result<Arc<Queue>, Error> {
        let queue = Arc::new(Queue::new(
            index,
            options,
            base,
            self.memory.clone(),
            self.faults.clone(),
        )?);
        queue.set_connection(lock(&self.connection).clone());
        lock(&self.queues).insert(index, queue.clone());
        Ok(queue)
    }

    pub fn queue(&self, index: u16) -> Result<Arc<Queue>, Error> {
        lock(&self.queues)
            .get(&index)
            .cloned()
            .ok_or_else(|| Error::Invalid(format!("there is no queue {index}")))
    }

    /// Keeps a span until [`Kit::release`] with its address.
    pub fn keep(&self, span: Span) -> u64 {
        let gpa = span.gpa();
        lock(&self.spans).insert(gpa, span);
        gpa
    }

    pub fn release(&self, gpa: u64) -> Result<(), Error> {
        let found = lock(&self.spans).remove(&gpa);
        found
            .map(drop)
            .ok_or_else(|| Error::Invalid(format!("nothing is allocated at {gpa:#x}")))
    }
}
