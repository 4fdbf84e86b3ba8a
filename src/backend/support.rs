//! Which backend can do what, as a table.

use std::fmt::Write;

use super::{Backend, OPERATIONS, cpu};

/// The backends that this crate was built with, and the operations that each can do.
pub fn backends() -> Vec<(&'static str, &'static [&'static str])> {
    #[allow(unused_mut, reason = "there may be no other backend")]
    let mut backends = vec![("cpu", cpu::Cpu::supported())];
    #[cfg(feature = "cuda")]
    backends.push(("cuda", super::cuda::Cuda::supported()));
    #[cfg(feature = "wgpu")]
    backends.push(("wgpu", super::wgpu::Wgpu::supported()));
    backends
}

/// A table of operations and backends, as Markdown.
///
/// ```
/// assert!(nearfar::backend::support_table().contains("| `matmul` | yes |"));
/// ```
pub fn support_table() -> String {
    let backends = backends();
    let mut table = String::from("| operation |");
    // Writing to a string cannot fail.
    for (name, _) in &backends {
        let _ = write!(table, " {name} |");
    }
    let _ = write!(table, "\n| --- |{}\n", " --- |".repeat(backends.len()));
    for operation in OPERATIONS {
        let _ = write!(table, "| `{operation}` |");
        for (_, supported) in &backends {
            table.push_str(if supported.contains(operation) { " yes |" } else { " no |" });
        }
        table.push('\n');
    }
    table
}
