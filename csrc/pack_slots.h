// The slots of a bucket as plain pointers, checked against the bucket before any kernel runs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "numbers.h"
#include "require.h"

namespace grpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// W [rows, cols] in the bucket's slot; A [rank, cols] and B [rows, rank] where there is LoRA.
struct Slot {
  const void* weight;
  const void* lora_a;
  const void* lora_b;
  int64_t offset;
  int64_t num_elements;
  int64_t num_rows;
  float lora_scale;
  int32_t rank;
  int32_t format;
  int32_t weight_is_float32;
  int32_t lora_is_float32;
};

inline int32_t is_float32(const Tensor& tensor, const char* what, size_t index) {
  const auto dtype = tensor.scalar_type();
  require(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, what, "[", index, "] is neither float32 nor bfloat16; convert it first");
  return dtype == ScalarType::Float;
}

inline void require_dense(const Tensor& tensor, const Tensor& bucket, const char* what, size_t index) {
  require(tensor.device() == bucket.device(), what, "[", index, "] is not on the bucket's device");
  require(tensor.is_contiguous(), what, "[", index, "] is not contiguous; call .contiguous()");
}

inline bool overlap(const Tensor& one, const Tensor& other) {
  const auto* a = static_cast<const char*>(one.data_ptr());
  const auto* b = static_cast<const char*>(other.data_ptr());
  const int64_t a_bytes = one.numel() * static_cast<int64_t>(one.element_size());
  const int64_t b_bytes = other.numel() * static_cast<int64_t>(other.element_size());
  return a_bytes > 0 && b_bytes > 0 && a < b + b_bytes && b < a + a_bytes;
}

inline std::vector<Slot> read_slots(
    const std::vector<Tensor>& weights, const Tensor& bucket, const std::vector<int64_t>& offsets, const std::vector<int64_t>& formats) {
  require(
      bucket.scalar_type() == ScalarType::Byte && bucket.dim() == 1 && bucket.is_contiguous(),
      "the bucket must be a contiguous uint8 vector");
  require(
      offsets.size() == weights.size() && formats.size() == weights.size(), weights.size(), " weights with ", offsets.size(),
      " offsets and ", formats.size(), " formats; give one each a weight");
  std::vector<Slot> slots;
  slots.reserve(weights.size());
  int64_t filled = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto& weight = weights[i];
    require_dense(weight, bucket, "weights", i);
    require(!overlap(weight, bucket), "weights[", i, "] shares memory with the bucket");
    const int64_t count = weight.numel();
    require(count <= INT32_MAX, "weights[", i, "] has ", count, " elements; at most 2^31 - 1 fit a slot");
    const int64_t rows = weight.dim() > 1 ? weight.size(0) : 1;
    require(
        formats[i] == kFloat32 || formats[i] == kBFloat16 || formats[i] == kFloat8E4M3, "formats[", i, "]=", formats[i],
        "; choose 0, 1 or 2");
    require(
        offsets[i] >= filled && offsets[i] % 16 == 0, "offsets[", i, "]=", offsets[i],
        " must be a multiple of 16 and not before the end of the slot before it, ", filled);
    const int64_t size = slot_bytes(formats[i], rows, count);
    require(
        size <= bucket.numel() - offsets[i], "weights[", i, "] ends at byte ", offsets[i], " + ", size, " of a bucket of ", bucket.numel());
    filled = offsets[i] + size;
    slots.push_back(
        {weight.data_ptr(), nullptr, nullptr, offsets[i], count, rows, 0.0f, 0, static_cast<int32_t>(formats[i]),
         is_float32(weight, "weights", i), 0});
  }
  return slots;
}

inline void add_lora(
    std::vector<Slot>& slots, const Tensor& bucket, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const std::vector<double>& scales) {
  const size_t count = lora_a.size();
  require(
      (count == 0 || count == slots.size()) && lora_b.size() == count && scales.size() == count, slots.size(), " weights with ", count,
      " lora_a, ", lora_b.size(), " lora_b and ", scales.size(), " lora_scales; give none or one each a weight");
  for (size_t i = 0; i < count; ++i) {
    const auto &a = lora_a[i], &b = lora_b[i];
    if (a.numel() == 0 && b.numel() == 0) continue;
    auto& slot = slots[i];
    require_dense(a, bucket, "lora_a", i);
    require_dense(b, bucket, "lora_b", i);
    require(!overlap(a, bucket) && !overlap(b, bucket), "lora_a[", i, "] or lora_b[", i, "] shares memory with the bucket");
    require(
        a.dim() == 2 && b.dim() == 2 && b.size(1) == a.size(0) && b.size(0) == slot.num_rows &&
            a.size(1) * slot.num_rows == slot.num_elements,
        "lora_a[", i, "] and lora_b[", i, "] must be [rank, columns] and [rows, rank] of their weight");
    slot.lora_is_float32 = is_float32(a, "lora_a", i);
    require(is_float32(b, "lora_b", i) == slot.lora_is_float32, "lora_a[", i, "] and lora_b[", i, "] differ in dtype");
    slot.lora_a = a.data_ptr();
    slot.lora_b = b.data_ptr();
    slot.rank = static_cast<int32_t>(a.size(0));
    slot.lora_scale = static_cast<float>(scales[i]);
  }
}

}  // namespace grpo_fast
