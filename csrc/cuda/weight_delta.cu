// Launches the delta kernels; waits once, for the count, so that what is returned is as large as it has to be.
#include <torch/csrc/stable/library.h>

#include "../delta_buckets.h"
#include "launch.h"
#include "weight_delta.cuh"

namespace grpo_fast {
namespace {

template <typename Value>
Delta find_delta(const Tensor& old_bucket, const Tensor& new_bucket, int64_t capacity) {
  const torch::stable::accelerator::DeviceGuard guard(new_bucket.get_device_index());
  const cudaStream_t stream = current_stream(new_bucket);
  const int64_t count = new_bucket.numel(), num_tiles = (count + kDeltaTile - 1) / kDeltaTile;
  if (count == 0) {
    Delta none = new_delta(new_bucket, 0);
    set_totals(none, 0, 0);
    return none;
  }
  const auto device = new_bucket.device();
  const Tensor bits = torch::stable::empty({num_tiles * kDeltaThreads}, ScalarType::Short, std::nullopt, device);
  const Tensor starts = torch::stable::empty({num_tiles}, ScalarType::Int, std::nullopt, device);
  const Tensor sums = torch::stable::empty({num_tiles + 2}, ScalarType::Long, std::nullopt, device);
  const auto* old = static_cast<const Value*>(old_bucket.const_data_ptr());
  const auto* now = static_cast<const Value*>(new_bucket.const_data_ptr());
  auto* bit = static_cast<uint16_t*>(bits.mutable_data_ptr());
  auto* start = static_cast<int32_t*>(starts.mutable_data_ptr());
  auto* sum = static_cast<uint64_t*>(sums.mutable_data_ptr());
  const auto tiles = static_cast<unsigned>(num_tiles);
  const bool aligned = (reinterpret_cast<uintptr_t>(old) | reinterpret_cast<uintptr_t>(now)) % 16 == 0;
  const auto compare = aligned ? compare_kernel<Value, true> : compare_kernel<Value, false>;
  compare<<<tiles, kDeltaThreads, 0, stream>>>(old, now, count, bit, start, sum);
  add_up_kernel<<<1, kScanThreads, 0, stream>>>(start, sum, num_tiles, sum + num_tiles);
  check_cuda(cudaGetLastError(), "weight_delta");
  uint64_t totals[2];
  check_cuda(cudaMemcpyAsync(totals, sum + num_tiles, sizeof totals, cudaMemcpyDeviceToHost, stream), "weight_delta");
  check_cuda(cudaStreamSynchronize(stream), "weight_delta");
  const auto changed = static_cast<int64_t>(totals[0]);
  Delta delta = new_delta(new_bucket, changed <= capacity ? changed : 0);
  set_totals(delta, changed, totals[1]);
  if (changed > 0 && changed <= capacity) {
    write_kernel<Value><<<tiles, kDeltaThreads, 0, stream>>>(
        now, bit, start, static_cast<int32_t*>(delta.indices.mutable_data_ptr()), static_cast<Value*>(delta.values.mutable_data_ptr()));
    check_cuda(cudaGetLastError(), "weight_delta");
  }
  return delta;
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CUDA, library) { library.impl("weight_delta", TORCH_BOX(&grpo_fast::weight_delta)); }
