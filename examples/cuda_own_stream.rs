//! A loss and its gradients inside a program that computes with CUDA already: on its stream, from its memory.
//!
//!     cargo run --release --no-default-features --features cuda --example cuda_own_stream

use nearfar::backend::cuda::{Cuda, Settings};
use nearfar::cudarc::driver::{CudaContext, CudaSlice, DevicePtr, DevicePtrMut, result, sys};
use nearfar::error::DType;
use nearfar::{Batch, Device, Objective};

const N: usize = 64;
const D: usize = 48;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The program's own: a context, a stream, and memory that its kernels write embeddings into. cudarc panics where there
    // is no driver.
    // SAFETY: looking for the driver loads it, which runs nothing but its own initialisation.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver here".into());
    }
    let stream = CudaContext::new(0)?.new_stream()?;
    let values = |seed: usize| -> Vec<f32> { (0..N * D).map(|i| ((i * 13 + seed) as f32 * 0.37).sin()).collect() };
    let queries: CudaSlice<f32> = stream.clone_htod(&values(1))?;
    let documents: CudaSlice<f32> = stream.clone_htod(&values(2))?;
    let mut gradients: CudaSlice<f32> = stream.alloc_zeros(N * D)?;

    // nearfar on that stream. Tensors are the memory, no copies: a slice goes with its tensor, an address stays the
    // program's.
    let device = Device::new(Cuda::from_stream("own", stream.clone(), Settings::default())?);
    let q = Cuda::tensor_of(&device, queries, [N, D])?;
    let (address, _reads) = documents.device_ptr(&stream);
    // SAFETY: there are N x D numbers, nobody writes them, and they live until the end of this program.
    let d = unsafe { Cuda::tensor(&device, address, [N, D], DType::F32)? };

    // Behind the loss on the stream comes what is done with its gradients: here they are copied. Nothing is waited for.
    let objective = Objective::samtone().temperature(0.05)?;
    let out = objective.forward_backward(&device, Batch::new(&q, &d))?;
    let (copy, writes) = gradients.device_ptr_mut(&stream);
    // SAFETY: both are N x D numbers, and the gradients live until the stream is waited for.
    unsafe { result::memcpy_dtod_async(copy, Cuda::address(&out.d_queries)?, N * D * 4, stream.cu_stream())? };
    drop(writes);
    let gradients = stream.clone_dtoh(&gradients)?;

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
