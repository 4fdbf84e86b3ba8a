use nearfar::Device;
use nearfar::backend::operations::*;
use std::time::Instant;
fn main() {
    let d: Device = std::env::args().nth(1).unwrap_or("wgpu".into()).parse().unwrap();
    for (m, n, k) in [(512, 512, 512), (1024, 1024, 128), (1024, 128, 1024)] {
        for (ta, tb) in [(false, false), (false, true), (true, false)] {
            let a = d.zeros(if ta { [k, m] } else { [m, k] }).unwrap();
            let b = d.zeros(if tb { [n, k] } else { [k, n] }).unwrap();
            let mut o = d.zeros([m, n]).unwrap();
            let mut s = d.zeros([1]).unwrap();
            let mut run = || {
                d.matmul(MatMul {
                    a: &a,
                    transpose_a: ta,
                    b: &b,
                    transpose_b: tb,
                    bias: None,
                    activation: Activation::Identity,
                    accumulate: false,
                    output: &mut o,
                })
                .unwrap();
                d.sum(Sum { input: &a, factor: 1.0, output: &mut s, accumulate: false }).unwrap();
                s.to_scalar().unwrap()
            };
            run();
            let t = Instant::now();
            for _ in 0..3 {
                run();
            }
            let e = t.elapsed().as_secs_f64() / 3.0;
            println!("{m}x{n}x{k} {ta} {tb}: {:.1} ms {:.2} GFLOP/s", e * 1e3, 2.0 * (m * n * k) as f64 / e / 1e9);
        }
    }
}
