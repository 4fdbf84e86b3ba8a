//! Launches of `pair_scores`.

use super::{Engine, Launch, Scratch};
use crate::Result;
use crate::backend::Tensor;
use crate::backend::operations::PairScores;
use crate::error::DType;
use crate::objective::scores::ScoreFunction;

/// Elements of a workgroup, and of one that sorts.
const GROUP: usize = 256;
const RUN: usize = 1024;

/// The pairs in ascending order of gold score, as (key, number), and where each one's ties begin and end.
struct Order {
    places: Scratch,
    ties: Scratch,
}

impl Order {
    /// A bitonic sort: always the same steps.
    fn new(engine: &dyn Engine, scores: &Tensor) -> Result<Self> {
        let count = scores.elements();
        let padded = count.next_power_of_two().max(RUN);
        let places = engine.scratch(2 * padded, DType::U32)?;
        engine.launch(
            Launch::new("pair_scores", "keys")
                .read("scores", scores)
                .write("order", &places)
                .size("count", count)
                .size("padded", padded)
                .row_of_groups(padded / GROUP),
        )?;
        let within = |shortest: usize, longest: usize| {
            engine.launch(
                Launch::new("pair_scores", "sort_within")
                    .write("order", &places)
                    .size("count", padded)
                    .size("shortest", shortest)
                    .size("longest", longest)
                    .row_of_groups(padded / RUN),
            )
        };
        within(2, RUN)?;
        let mut longest = 2 * RUN;
        while longest <= padded {
            let mut distance = longest / 2;
            while distance >= RUN {
                engine.launch(
                    Launch::new("pair_scores", "sort_across")
                        .write("order", &places)
                        .size("count", padded / 2)
                        .size("longest", longest)
                        .size("distance", distance)
                        .row_of_groups((padded / 2).div_ceil(GROUP)),
                )?;
                distance /= 2;
            }
            within(longest, longest)?;
            longest *= 2;
        }
        let ties = engine.scratch(2 * count, DType::U32)?;
        engine.launch(
            Launch::new("pair_scores", "ties")
                .write("order", &places)
                .write("ties_of", &ties)
                .size("count", count)
                .row_of_groups(count.div_ceil(GROUP)),
        )?;
        Ok(Self { places, ties })
    }
}

/// Running sums of exponentials, in place: those of each 256, and the totals of these the same way.
fn scan(engine: &dyn Engine, sums: &Scratch, count: usize) -> Result<()> {
    let groups = count.div_ceil(GROUP);
    let totals = engine.scratch(2 * groups, DType::F32)?;
    engine.launch(
        Launch::new("pair_scores", "scan")
            .write("sums", sums)
            .write("totals", &totals)
            .size("count", count)
            .row_of_groups(groups),
    )?;
    if groups == 1 {
        return Ok(());
    }
    scan(engine, &totals, groups)?;
    engine.launch(
        Launch::new("pair_scores", "add_before")
            .write("sums", sums)
            .write("totals", &totals)
            .size("count", count)
            .row_of_groups(groups),
    )
}

pub(crate) fn forward(engine: &dyn Engine, arguments: PairScores<'_>) -> Result<()> {
    let PairScores { similarity, scores, log_scale, function, loss, gradient } = arguments;
    let count = similarity.elements();
    let launch = |entry: &'static str| {
        let launch = Launch::new("pair_scores", entry).read("similarity", similarity).read("log_scale", log_scale);
        launch.size("count", count)
    };
    if function == ScoreFunction::Pearson {
        let launch = launch("pearson").read("scores", scores);
        return engine.launch(launch.write("loss", &*loss).write("gradient", &*gradient));
    }
    let order = Order::new(engine, scores)?;
    let launch = |entry: &'static str| launch(entry).write("order", &order.places);
    if function == ScoreFunction::RankKl {
        let launch = launch("rank_kl").write("ties_of", &order.ties);
        return engine.launch(launch.write("loss", &*loss).write("gradient", &*gradient));
    }
    let running = |reversed: bool| -> Result<Scratch> {
        let sums = engine.scratch(2 * count, DType::F32)?;
        let launch = launch("exponents").flag("REVERSED", reversed).write("sums", &sums);
        engine.launch(launch.row_of_groups(count.div_ceil(GROUP)))?;
        scan(engine, &sums, count)?;
        Ok(sums)
    };
    let (below, above) = (running(false)?, running(true)?);
    let total = engine.scratch(2, DType::F32)?;
    let launch =
        |entry: &'static str| launch(entry).write("ties_of", &order.ties).read("below", &below).write("totals", &total);
    engine.launch(launch("cosent").write("loss", &*loss))?;
    let launch = launch("cosent_gradient").read("above", &above).write("gradient", &*gradient);
    engine.launch(launch.row_of_groups(count.div_ceil(GROUP)))
}

#[cfg(test)]
mod tests {
    use crate::backend::operations::PairScores;
    use crate::error::DType;
    use crate::objective::scores::ScoreFunction;
    use crate::{Device, Result};

    fn run(device: &Device, function: ScoreFunction, similarity: &[f32], scores: &[f32]) -> Result<(f32, Vec<f32>)> {
        let mut loss = device.empty([1], DType::F32)?;
        let mut gradient = device.empty([similarity.len()], DType::F32)?;
        device.pair_scores(PairScores {
            similarity: &device.tensor(similarity, [similarity.len()])?,
            scores: &device.tensor(scores, [scores.len()])?,
            log_scale: &device.tensor(&[3.0], [1])?,
            function,
            loss: &mut loss,
            gradient: &mut gradient,
        })?;
        Ok((loss.to_scalar()?, gradient.to_host()?))
    }

    /// So many pairs that several workgroups sort and add, on every device there is, against the processor.
    #[test]
    fn many_pairs_as_on_the_processor() {
        for n in [1_024, 1_025, 70_001] {
            // A permutation with some scores twice: the factor is a prime.
            let scores: Vec<f32> = (0..n).map(|i| (i * 7_919 % n / 3 * 2) as f32 - 99.0).collect();
            let similarity: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            for device in Device::available() {
                for function in [ScoreFunction::Cosent, ScoreFunction::Pearson, ScoreFunction::RankKl] {
                    let (loss, gradient) = run(&device, function, &similarity, &scores).unwrap();
                    let (expected, of_processor) = run(&Device::cpu(), function, &similarity, &scores).unwrap();
                    let close = |a: f32, b: f32, size: f32| (a - b).abs() <= 2e-5 * size;
                    assert!(close(loss, expected, expected.abs()), "{function} of {n}: {loss} {expected}");
                    let size = of_processor.iter().fold(0.0, |size: f32, g| size.max(g.abs()));
                    for (i, (found, expected)) in gradient.iter().zip(&of_processor).enumerate() {
                        assert!(close(*found, *expected, size), "{function} of {n}, {i}: {found} {expected}");
                    }
                    assert_eq!((loss, gradient), run(&device, function, &similarity, &scores).unwrap());
                }
            }
        }
    }
}
