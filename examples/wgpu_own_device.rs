//! A loss and its gradients inside a program that has a GPU already: on its device, from its buffers, in its encoder.
//!
//!     cargo run --release --no-default-features --features wgpu --example wgpu_own_device

use nearfar::backend::wgpu::Wgpu;
use nearfar::error::DType;
use nearfar::{Batch, Device, Objective, wgpu};

const N: usize = 64;
const D: usize = 48;
const BYTES: u64 = (N * D * 4) as u64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The program's own: a device, a queue, and buffers that its shaders write embeddings into.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let adapter = adapters.first().ok_or("wgpu finds no adapter here")?;
    let (gpu, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    let create = |label, usage| {
        gpu.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size: BYTES, usage, mapped_at_creation: false })
    };
    let embeddings = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let (queries, documents) = (create("queries", embeddings), create("documents", embeddings));
    let values = |seed: usize| -> Vec<f32> { (0..N * D).map(|i| ((i * 13 + seed) as f32 * 0.37).sin()).collect() };
    queue.write_buffer(&queries, 0, bytemuck::cast_slice(&values(1)));
    queue.write_buffer(&documents, 0, bytemuck::cast_slice(&values(2)));

    // nearfar on that device. Tensors are the buffers, no copies.
    let device = Device::new(Wgpu::from_device("own", gpu.clone(), queue.clone())?);
    let q = Wgpu::tensor(&device, queries, [N, D], DType::F32)?;
    let d = Wgpu::tensor(&device, documents, [N, D], DType::F32)?;

    // Into the program's encoder go the loss and what is done with its gradients: here they are copied to be read.
    let objective = Objective::samtone().temperature(0.05)?;
    let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let batch = Batch::new(&q, &d);
    let out = Wgpu::record(&device, &mut encoder, || objective.forward_backward(&device, batch))?;
    let read = create("read", wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
    encoder.copy_buffer_to_buffer(Wgpu::buffer(&out.d_queries)?, 0, &read, 0, BYTES);
    queue.submit([encoder.finish()]);
    read.map_async(wgpu::MapMode::Read, .., |_| ());
    gpu.poll(wgpu::PollType::wait_indefinitely())?;
    let gradients: Vec<f32> = bytemuck::cast_slice(&read.get_mapped_range(..)?).to_vec();

    // The same on the processor.
    let cpu = Device::cpu();
    let (q, d) = (cpu.tensor(&values(1), [N, D])?, cpu.tensor(&values(2), [N, D])?);
    let expected = objective.forward_backward(&cpu, Batch::new(&q, &d))?;
    let (loss, expected_loss) = (out.loss.to_scalar()?, expected.loss.to_scalar()?);
    let expected = expected.d_queries.to_host::<f32>()?;
    let largest = expected.iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
    let error = gradients.iter().zip(&expected).fold(0.0f32, |error, (a, b)| error.max((a - b).abs()));
    println!("{}", device.description());
    println!("loss {loss:.6}, on the processor {expected_loss:.6}");
    println!("gradients differ by {:.1e} of the largest", error / largest);
    if (loss - expected_loss).abs() > 1e-5 * expected_loss || error > 1e-5 * largest {
        return Err("the two do not agree".into());
    }
    Ok(())
}
