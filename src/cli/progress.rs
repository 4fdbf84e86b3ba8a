//! Progress bars: on stderr, and only where a person is looking at it.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of so many texts. It draws nothing unless stderr is a terminal, and goes away when it is dropped.
pub(crate) fn bar(what: &'static str, texts: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(texts as u64), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg:9} {bar:40} {human_pos}/{human_len}, {eta} left") {
        bar.set_style(style);
    }
    bar.with_message(what).with_finish(indicatif::ProgressFinish::AndClear)
}
