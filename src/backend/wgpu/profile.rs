//! How long each entry point takes on the device, for devices that are opened with `profile`.
//!
//! Every launch is a pass of its own then, with a time stamp at both ends, and a submission is waited for: what is
//! measured is the launches, not how well they follow each other.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use ::wgpu;

use crate::backend::Timing;

/// Time stamps of a submission at most: what WebGPU allows a query set to have.
const STAMPS: u32 = 4096;

/// Time stamps and what they came to so far.
#[derive(Debug)]
pub(super) struct Profile {
    stamps: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    downloaded: wgpu::Buffer,
    /// Nanoseconds of one tick.
    tick: f64,
    totals: Mutex<BTreeMap<String, (usize, f64)>>,
}

impl Profile {
    /// None where the device has no time stamps.
    pub(super) fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Option<Self> {
        if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return None;
        }
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("time stamps"),
                size: 8 * u64::from(STAMPS),
                usage,
                mapped_at_creation: false,
            })
        };
        Some(Self {
            stamps: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("time stamps"),
                ty: wgpu::QueryType::Timestamp,
                count: STAMPS,
            }),
            resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            downloaded: buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
            tick: f64::from(queue.get_timestamp_period()),
            totals: Mutex::default(),
        })
    }

    /// The time stamps of the launch of a number; none beyond what there is room for.
    pub(super) fn stamps_of(&self, launch: usize) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let first = u32::try_from(2 * launch).ok().filter(|first| first + 1 < STAMPS)?;
        Some(wgpu::ComputePassTimestampWrites {
            query_set: &self.stamps,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        })
    }

    /// Has the stamps of so many launches copied once they are there.
    pub(super) fn resolve(&self, launches: usize, encoder: &mut wgpu::CommandEncoder) {
        let stamps = (2 * launches).min(STAMPS as usize) as u32;
        if stamps > 0 {
            encoder.resolve_query_set(&self.stamps, 0..stamps, &self.resolved, 0);
            encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.downloaded, 0, 8 * u64::from(stamps));
        }
    }

    /// Waits for a submission and adds up how long its launches took; their names come in their order.
    pub(super) fn collect<'a>(&self, device: &wgpu::Device, names: impl ExactSizeIterator<Item = &'a str>) {
        let stamps = 2 * names.len().min(STAMPS as usize / 2);
        if stamps == 0 {
            return;
        }
        let range = 0..8 * stamps as u64;
        self.downloaded.map_async(wgpu::MapMode::Read, range.clone(), |_| {});
        // A device that cannot is reported by whoever asks it for something next.
        if device.poll(wgpu::PollType::wait_indefinitely()).is_err() {
            return;
        }
        if let Ok(view) = self.downloaded.get_mapped_range(range) {
            let ticks: Vec<u64> = view.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
            let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
            for (name, stamps) in names.zip(ticks.as_chunks::<2>().0) {
                let total = totals.entry(name.to_owned()).or_default();
                total.0 += 1;
                total.1 += stamps[1].saturating_sub(stamps[0]) as f64 * self.tick * 1e-9;
            }
        }
        self.downloaded.unmap();
    }

    /// What took how long so far, the longest first.
    pub(super) fn timings(&self) -> Vec<Timing> {
        Timing::longest_first(&self.totals.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
