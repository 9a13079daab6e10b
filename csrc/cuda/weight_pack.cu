// Launches the weight kernels: one launch for every kTableSlots weights of a bucket.
#include <algorithm>

#include "../pack_slots.h"
#include "launch.h"
#include "weight_pack.cuh"

namespace grpo_fast {
namespace {

int64_t ceil_div(int64_t size, int64_t part) { return (size + part - 1) / part; }

int64_t num_tiles(const Slot& slot, bool packing) {
  if (slot.num_elements == 0) return 0;
  const int64_t row_tiles = ceil_div(slot.num_rows, kTileRows);
  if (packing && slot.format == kFloat8E4M3) return row_tiles;
  if (packing && slot.rank) return row_tiles * ceil_div(slot.num_elements / slot.num_rows, kTileColumns);
  return ceil_div(slot.num_elements, kPlainTile);
}

DeviceSlot device_slot(const Slot& slot, char* bucket, int64_t first_tile) {
  char* out = bucket + slot.offset;
  const auto places = reinterpret_cast<uintptr_t>(slot.weight) | reinterpret_cast<uintptr_t>(out);
  return {
      const_cast<void*>(slot.weight),
      slot.lora_a,
      slot.lora_b,
      out,
      static_cast<int32_t>(slot.num_elements),
      static_cast<int32_t>(slot.num_elements / slot.num_rows),
      static_cast<int32_t>(first_tile),
      slot.rank,
      slot.lora_scale,
      static_cast<uint8_t>(slot.format),
      static_cast<uint8_t>(slot.weight_is_float32),
      static_cast<uint8_t>(slot.lora_is_float32),
      static_cast<uint8_t>(places % 16 == 0),
  };
}

// A float8 row without columns has a scale all the same, which no tile writes.
void write_empty_scales(const Slot& slot, char* bucket, cudaStream_t stream) {
  if (slot.format != kFloat8E4M3 || slot.num_elements > 0 || slot.num_rows == 0) return;
  const std::vector<float> ones(slot.num_rows, 1.0f);
  check_cuda(
      cudaMemcpyAsync(bucket + slot.offset, ones.data(), 4 * ones.size(), cudaMemcpyHostToDevice, stream), "copying scales");
  check_cuda(cudaStreamSynchronize(stream), "copying scales");
}

template <typename Kernel>
void launch(const std::vector<Slot>& slots, const Tensor& bucket, bool packing, Kernel kernel) {
  const torch::stable::accelerator::DeviceGuard guard(bucket.get_device_index());
  const cudaStream_t stream = current_stream(bucket);
  auto* base = static_cast<char*>(bucket.mutable_data_ptr());
  Table table;
  int64_t tiles = 0;
  const auto flush = [&] {
    if (tiles > 0) kernel<<<static_cast<unsigned>(tiles), kPackThreads, 0, stream>>>(table);
    check_cuda(cudaGetLastError(), packing ? "pack_weights" : "unpack_weights");
    table.num_slots = 0;
    tiles = 0;
  };
  table.num_slots = 0;
  for (const auto& slot : slots) {
    if (packing) write_empty_scales(slot, base, stream);
    const int64_t more = num_tiles(slot, packing);
    if (more == 0) continue;
    if (table.num_slots == kTableSlots || tiles + more > INT32_MAX) flush();
    table.slots[table.num_slots++] = device_slot(slot, base, tiles);
    tiles += more;
  }
  flush();
}

void pack_weights(
    std::vector<Tensor> weights, Tensor bucket, std::vector<int64_t> offsets, std::vector<int64_t> formats, std::vector<Tensor> lora_a,
    std::vector<Tensor> lora_b, std::vector<double> lora_scales) {
  auto slots = read_slots(weights, bucket, offsets, formats);
  add_lora(slots, bucket, lora_a, lora_b, lora_scales);
  const auto is_plain = [](const Slot& slot) { return slot.format != kFloat8E4M3 && slot.rank == 0; };
  const bool plain = std::all_of(slots.begin(), slots.end(), is_plain);
  launch(slots, bucket, true, plain ? pack_weights_kernel<true> : pack_weights_kernel<false>);
}

void unpack_weights(Tensor bucket, std::vector<Tensor> weights, std::vector<int64_t> offsets, std::vector<int64_t> formats) {
  launch(read_slots(weights, bucket, offsets, formats), bucket, false, unpack_weights_kernel);
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CUDA, library) {
  library.impl("pack_weights", TORCH_BOX(&grpo_fast::pack_weights));
  library.impl("unpack_weights", TORCH_BOX(&grpo_fast::unpack_weights));
}
