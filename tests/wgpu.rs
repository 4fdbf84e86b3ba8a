//! The first adapter that wgpu finds: a caller's own device, what can go wrong, submissions, and the conformance table.
//!
//! Where there is no adapter the tests pass and say that they were skipped, unless NEARFAR_TEST_WGPU says that there has
//! to be one.
#![cfg(feature = "wgpu")]

#[path = "common/products.rs"]
mod products;

use std::fmt::Debug;

use nearfar::backend::wgpu::{Settings, Wgpu};
use nearfar::conformance::{self, Case, Outcome, Verdict};
use nearfar::error::DType;
use nearfar::{Device, Error, Result, Tensor, wgpu};
use products::{expected, matmul, values};

/// A device of the test's own.
fn open(settings: Settings) -> Option<Device> {
    match Wgpu::open(0, settings) {
        Ok(opened) => Some(Device::new(opened)),
        Err(error) if std::env::var_os("NEARFAR_TEST_WGPU").is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn raw(device: &Device) -> &Wgpu {
    device.backend().unwrap()
}

#[track_caller]
fn assert_near(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-4, "{found}, not {expected}");
    }
}

fn create_buffer(device: &wgpu::Device, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
}

const USAGES: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

#[test]
fn a_callers_device_and_buffers_are_used_as_they_are() {
    let Some(opened) = open(Settings::default()) else { return };
    let (device, queue) = (raw(&opened).device().clone(), raw(&opened).queue().clone());
    let own = Device::new(Wgpu::from_device("own", device.clone(), queue.clone()).unwrap());
    assert_eq!(own.name(), "own");
    let (a, b) = (values(6 * 5, 1), values(5 * 4, 2));
    let buffer = create_buffer(&device, 6 * 5 * 4, USAGES);
    queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&a));
    let on_device = Wgpu::tensor(&own, buffer.clone(), [6, 5], DType::F32).unwrap();
    assert_eq!(Wgpu::buffer(&on_device).unwrap(), &buffer);
    let product = matmul(&own, &on_device, &own.tensor(&b, [5, 4]).unwrap()).unwrap();
    own.submit().unwrap();

    // What is in the product's buffer is read without nearfar.
    let read = create_buffer(&device, 6 * 4 * 4, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(Wgpu::buffer(&product).unwrap(), 0, &read, 0, 6 * 4 * 4);
    queue.submit([encoder.finish()]);
    read.map_async(wgpu::MapMode::Read, .., |result| result.unwrap());
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let found: Vec<f32> = bytemuck::cast_slice(&read.get_mapped_range(..).unwrap()).to_vec();
    assert_near(&found, &expected(&a, &b, 6, 4));
    // A tensor of the other device is not one of this.
    let error = matmul(&opened, &on_device, &on_device).unwrap_err();
    assert!(matches!(error, Error::OtherDevice { .. }), "{error}");
}

#[test]
fn buffers_that_cannot_be_tensors_are_refused() {
    let Some(device) = open(Settings::default()) else { return };
    let buffer = |size, usage| create_buffer(raw(&device).device(), size, usage);
    let refused = |found: Result<Tensor>, expected: &str| {
        let error = found.unwrap_err().to_string();
        assert!(error.contains(expected), "no `{expected}` in: {error}");
    };
    refused(Wgpu::tensor(&device, buffer(44, USAGES), [3, 4], DType::F32), "has 44 bytes, (3, 4) of f32 takes 48");
    Wgpu::tensor(&device, buffer(48, USAGES), [3, 4], DType::F32).unwrap();
    // Shaders read two halves at a time.
    refused(Wgpu::tensor(&device, buffer(4, USAGES), [3], DType::F16), "takes 8");
    let readable = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    refused(Wgpu::tensor(&device, buffer(48, readable), [3, 4], DType::F32), "lacks the usage COPY_DST");
    let vertices = buffer(48, wgpu::BufferUsages::VERTEX | wgpu::BufferUsages::COPY_DST);
    refused(Wgpu::tensor(&device, vertices, [3, 4], DType::F32), "lacks the usage COPY_SRC and STORAGE");
    let of_cpu = Device::cpu();
    refused(Wgpu::tensor(&of_cpu, buffer(48, USAGES), [3, 4], DType::F32), "`device` lives on cpu");
    let error = Wgpu::buffer(&of_cpu.zeros([3]).unwrap()).unwrap_err();
    assert!(matches!(error, Error::OtherDevice { .. }), "{error}");
}

/// Recordings run when their encoders are submitted, in that order, whatever the device does before.
#[test]
fn recordings_wait_for_their_caller() {
    let Some(device) = open(Settings::default()) else { return };
    let wgpu = raw(&device);
    let encoder = || wgpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let (a, b, c) = (values(40 * 30, 1), values(30 * 20, 2), values(20 * 40, 3));
    let on_device = device.tensor(&a, [40, 30]).unwrap();
    let record = |encoder: &mut wgpu::CommandEncoder, b: &[f32], width: usize, c: &[f32]| {
        let (inner, out) = (b.len() / width, c.len() / width);
        Wgpu::record(&device, encoder, || {
            let b = device.tensor(b, [inner, width])?;
            let first = matmul(&device, &on_device, &b)?;
            device.submit()?;
            matmul(&device, &first, &device.tensor(c, [width, out])?)
        })
    };
    let submissions = wgpu.submissions();
    let (mut one, mut two) = (encoder(), encoder());
    let first = record(&mut one, &b, 20, &c).unwrap();
    let after_first = wgpu.submissions();
    assert!(after_first <= submissions + 1, "only what was asked for before may have been submitted");
    let second = record(&mut two, &b[..300], 10, &c[..400]).unwrap();
    assert_eq!(wgpu.submissions(), after_first);

    // Work of the device's own meanwhile, on as much memory as the recordings have used.
    for seed in 0..20 {
        let (x, y) = (values(40 * 30, seed), values(30 * 20, seed));
        let product = matmul(&device, &device.tensor(&x, [40, 30]).unwrap(), &device.tensor(&y, [30, 20]).unwrap());
        assert_near(&product.unwrap().to_host::<f32>().unwrap(), &expected(&x, &y, 40, 20));
    }
    let busy: Vec<Tensor> = (0..20).map(|_| device.tensor(&vec![1.5f32; 40 * 40], [40, 40]).unwrap()).collect();
    device.submit().unwrap();

    wgpu.queue().submit([two.finish()]);
    wgpu.queue().submit([one.finish()]);
    let a_b = expected(&a, &b, 40, 20);
    assert_near(&first.to_host::<f32>().unwrap(), &expected(&a_b, &c, 40, 40));
    let a_b = expected(&a, &b[..300], 40, 10);
    assert_near(&second.to_host::<f32>().unwrap(), &expected(&a_b, &c[..400], 40, 40));
    for tensor in &busy {
        assert!(tensor.to_host::<f32>().unwrap().iter().all(|&value| value == 1.5), "a recording wrote into it");
    }
    drop((first, second, busy, on_device));
}

/// More launches than share a buffer of parameters, and uploads too large for the record.
#[test]
fn recordings_may_be_long() {
    let Some(device) = open(Settings::default()) else { return };
    let wgpu = raw(&device);
    let mut encoder = wgpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let large = values(700_000, 3);
    let (sum, copy) = Wgpu::record(&device, &mut encoder, || {
        let mut sum = device.zeros([64])?;
        let ones = device.tensor(&[1.0f32; 64], [64])?;
        for _ in 0..600 {
            device.add(nearfar::backend::operations::Add { input: &ones, output: &mut sum })?;
        }
        Ok((sum, device.tensor(&large, [large.len()])?))
    })
    .unwrap();
    wgpu.queue().submit([encoder.finish()]);
    assert_eq!(sum.to_host::<f32>().unwrap(), [600.0; 64]);
    assert!(copy.to_host::<f32>().unwrap() == large);
}

#[test]
fn what_cannot_be_recorded_is_an_error_and_leaves_the_device_usable() {
    let Some(device) = open(Settings::default()) else { return };
    let wgpu = raw(&device);
    let mut encoder = wgpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let tensor = device.tensor(&[1.0f32, 2.0], [2]).unwrap();
    let refused = |result: Result<()>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "no `{expected}` in: {error}");
    };
    let read = Wgpu::record(&device, &mut encoder, || tensor.to_host::<f32>().map(drop));
    refused(read, "cannot be read before the encoder");
    let mut other = wgpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let nested = Wgpu::record(&device, &mut encoder, || Wgpu::record(&device, &mut other, || Ok(())));
    refused(nested, "cannot be recorded while another one is");
    refused(Wgpu::record(&Device::cpu(), &mut encoder, || Ok(())), "`device` lives on cpu");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Wgpu::record(&device, &mut other, || -> Result<()> { panic!("on purpose") })
    }));
    assert!(panicked.is_err());
    assert_eq!(tensor.to_host::<f32>().unwrap(), [1.0, 2.0]);
}

#[test]
fn what_is_missing_or_too_large_is_named() {
    let error = "wgpu:77".parse::<Device>().unwrap_err();
    assert!(matches!(&error, Error::NoDevice { requested, .. } if requested == "wgpu:77"), "{error}");
    let error = "wgpu:0,fast".parse::<Device>().unwrap_err().to_string();
    assert!(error.contains("`fast`") && error.contains("default-limits"), "{error}");
    let mut settings = Settings::default();
    settings.default_limits = true;
    let Some(device) = open(settings) else { return };
    let adapter = raw(&device).device().adapter_info().name;
    for shape in [[1 << 20, 1 << 20], [1 << 40, 1 << 40], [usize::MAX / 8, 4]] {
        let error = device.empty(shape, DType::F32).unwrap_err();
        let Error::Limit { device, limit, .. } = &error else { panic!("{error}") };
        assert!(device.contains(&adapter) && *limit == "max_buffer_size", "{error}");
    }
    // The device goes on.
    assert_eq!(device.tensor(&[2.5f32], [1]).unwrap().to_scalar().unwrap(), 2.5);
}

/// Everything that is asked of a device that is gone is an error, and none of it a panic.
#[test]
fn a_lost_device_is_an_error_everywhere() {
    fn lost<T: Debug>(what: &str, result: Result<T>) {
        match result {
            Err(Error::DeviceLost { device, .. }) => assert!(device.contains("wgpu:0"), "{device}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    let Some(device) = open(Settings::default()) else { return };
    let tensor = device.tensor(&values(300, 0), [20, 15]).unwrap();
    assert!(tensor.to_host::<f32>().is_ok());
    raw(&device).device().destroy();
    lost("to_host", tensor.to_host::<f32>());
    lost("submit", device.tensor(&values(300, 1), [15, 20]).and_then(|_| device.submit()));
    lost("matmul", matmul(&device, &tensor, &tensor.reshape([15, 20]).unwrap()).and_then(|out| out.to_host::<f32>()));
    lost("a large upload", device.tensor(&vec![0.0f32; 1 << 20], [1 << 20]).and_then(|out| out.to_host::<f32>()));
    let mut encoder = raw(&device).device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    lost("record", Wgpu::record(&device, &mut encoder, || device.tensor(&[1.0f32], [1])));
}

/// Runs the test below in a process that may take 12 GB, not all of which can be had for buffers.
#[cfg(unix)]
#[test]
fn memory_that_is_not_there_is_an_error() {
    if open(Settings::default()).is_none() {
        return;
    }
    let limited = "ulimit -v 12000000 && exec \"$0\" --exact memory_is_taken_until_there_is_none --ignored --nocapture";
    let program = std::env::current_exe().unwrap();
    let output = std::process::Command::new("sh").args(["-c", limited]).arg(program).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}{stderr}");
}

#[test]
#[ignore = "takes all memory; is run by the test above, with a limit"]
fn memory_is_taken_until_there_is_none() {
    let Some(device) = open(Settings::default()) else { return };
    if raw(&device).device().adapter_info().device_type != wgpu::DeviceType::Cpu {
        return println!("skipped: the memory of hardware is not this process's");
    }
    const QUARTER_OF_A_GIB: usize = 1 << 28;
    let mut taken = Vec::new();
    let error = loop {
        match device.empty([QUARTER_OF_A_GIB / 4], DType::F32) {
            Ok(tensor) => taken.push(tensor),
            Err(error) => break error,
        }
        assert!(taken.len() < 64, "more memory than there may be");
    };
    assert!(matches!(error, Error::OutOfMemory { bytes: QUARTER_OF_A_GIB, .. }), "{error}");
    // The device goes on.
    assert_eq!(device.tensor(&[2.5f32], [1]).unwrap().to_scalar().unwrap(), 2.5);
}

/// All rows of the table; with WebGPU's default limits and every index checked only objectives and operations as they
/// are, without further settings: what takes long is to compile the shaders of all others.
#[test]
fn the_first_adapter_conforms() {
    let mut strict = Settings::default();
    (strict.checked, strict.default_limits) = (true, true);
    for settings in [Settings::default(), strict] {
        let Some(device) = open(settings) else { return };
        let (name, description) = (device.name(), device.description());
        let cases = conformance::cases();
        let cases: Vec<&Case> =
            cases.iter().filter(|case| settings != strict || !case.is_slow() && !case.name().contains('+')).collect();
        let (mut failing, mut worst) = (Vec::new(), (0.0, String::new()));
        let show = |case: &Case, outcome: Outcome| {
            match Verdict::of(&description, case.name(), &outcome) {
                Verdict::Fails => failing.push(format!("{}: {outcome}", case.name())),
                Verdict::HoldsUnexpectedly(reason) => {
                    failing.push(format!("{} holds, but was to fail: {reason}", case.name()));
                }
                Verdict::FailsAsExpected(reason) => println!("{}: {outcome}; known: {reason}", case.name()),
                Verdict::Holds if outcome.ratio() > worst.0 => worst = (outcome.ratio(), case.name().to_owned()),
                Verdict::Holds => {}
            }
            Ok::<(), Error>(())
        };
        conformance::run(&device, &cases, show).unwrap();
        assert!(
            failing.is_empty(),
            "{} of {} rows fail on {name}, {description}:\n{}",
            failing.len(),
            cases.len(),
            failing.join("\n")
        );
        println!("{name}: {} rows, worst {:.3} of its bound: {}", cases.len(), worst.0, worst.1);
    }
}

#[cfg(feature = "train")]
mod training {
    use std::path::Path;

    use nearfar::train::{self, Event, TrainSettings, Watcher, resume, train};

    use super::*;

    const WORDS: [&str; 12] =
        ["amber", "berry", "cloud", "delta", "ember", "frost", "glass", "honey", "ivory", "jewel", "koala", "lilac"];

    fn settings(folder: &Path) -> TrainSettings {
        let word = |i: usize| WORDS[i % WORDS.len()];
        let lines: Vec<String> = (0..36)
            .map(|i| {
                let (query, document) =
                    (format!("what is {} {}", word(i), i), format!("{} {i} by {}", word(i), word(7 * i)));
                serde_json::json!({ "query": query, "document": document }).to_string()
            })
            .collect();
        std::fs::write(folder.join("pairs.jsonl"), lines.join("\n")).unwrap();
        TrainSettings {
            pairs: folder.join("pairs.jsonl"),
            evaluate_on: None,
            layers: 1,
            hidden_size: 16,
            feed_forward_size: 32,
            vocabulary_size: 200,
            batch_size: 12,
            max_query_length: 8,
            max_document_length: 16,
            steps: Some(14),
            checkpoint_every: 5,
            ..TrainSettings::default()
        }
    }

    /// The losses in a folder, step by step.
    fn losses(output: &Path) -> Vec<f64> {
        let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        records.filter_map(|record| record["loss"].as_f64()).collect()
    }

    struct Destroy(wgpu::Device);

    impl Watcher for Destroy {
        fn event(&mut self, event: Event<'_>) {
            if matches!(event, Event::Checkpoint { step: 5 }) {
                self.0.destroy();
            }
        }
    }

    #[test]
    fn a_training_follows_that_of_the_processor_and_survives_the_loss_of_its_device() {
        let Some(device) = open(Settings::default()) else { return };
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path());
        let run = |device: &Device, name: &str, watcher: &mut dyn Watcher| -> Result<train::Outcome> {
            train(&settings, &folder.path().join(name), device, watcher)
        };
        run(&Device::cpu(), "cpu", &mut |_: Event<'_>| ()).unwrap();
        let whole = run(&device, "whole", &mut |_: Event<'_>| ()).unwrap();
        let (expected, found) = (losses(&folder.path().join("cpu")), losses(&folder.path().join("whole")));
        assert_eq!((expected.len(), found.len()), (14, 14));
        for (step, (expected, found)) in expected.iter().zip(&found).enumerate() {
            assert!((found - expected).abs() <= 1e-3 * expected.abs(), "step {}: {found}, not {expected}", step + 1);
        }

        let Some(fragile) = open(Settings::default()) else { return };
        let error = run(&fragile, "parts", &mut Destroy(raw(&fragile).device().clone())).unwrap_err();
        let Error::DeviceLost { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains("the checkpoint of step 5 is kept in"), "{error}");
        let resumed = resume(None, &folder.path().join("parts"), &device, &mut |_: Event<'_>| ()).unwrap();
        assert_eq!((resumed.steps, resumed.loss.to_bits()), (whole.steps, whole.loss.to_bits()));
        let weights = |name: &str| std::fs::read(folder.path().join(name).join("checkpoint.safetensors")).unwrap();
        assert!(weights("whole") == weights("parts"), "the weights are not those of a training without interruption");
    }
}
