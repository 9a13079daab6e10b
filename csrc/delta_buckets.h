// What a delta is made of, and what two buckets must have in common.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "require.h"

namespace grpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Delta {
  Tensor indices;   // int32, ascending; empty where more changed than the capacity
  Tensor values;    // of the buckets' dtype, as many
  Tensor count;     // int64 [1] on the host: how many changed
  Tensor checksum;  // int64 [1] on the host, of the new bucket
};

inline void check_buckets(const Tensor& old_bucket, const Tensor& new_bucket, int64_t capacity) {
  require(old_bucket.device() == new_bucket.device(), "old and new lie on different devices");
  require(old_bucket.scalar_type() == new_bucket.scalar_type(), "old and new differ in dtype");
  require(old_bucket.dim() == 1 && new_bucket.dim() == 1, "old and new must be vectors");
  require(old_bucket.numel() == new_bucket.numel(), "old has ", old_bucket.numel(), " elements, new has ", new_bucket.numel());
  require(old_bucket.is_contiguous() && new_bucket.is_contiguous(), "old and new must be contiguous; call .contiguous()");
  require(new_bucket.numel() <= INT32_MAX, new_bucket.numel(), " elements; indices are int32, so at most 2^31 - 1");
  require(new_bucket.element_size() <= 4, "elements of ", new_bucket.element_size(), " bytes; view them as 4-byte ones");
  require(capacity >= 0, "capacity=", capacity, "; it must not be negative");
}

inline Delta new_delta(const Tensor& like, int64_t size) {
  const auto device = like.device();
  return {
      torch::stable::empty({size}, ScalarType::Int, std::nullopt, device),
      torch::stable::empty({size}, like.scalar_type(), std::nullopt, device),
      torch::stable::empty({1}, ScalarType::Long),
      torch::stable::empty({1}, ScalarType::Long),
  };
}

inline void set_totals(const Delta& delta, int64_t count, uint64_t checksum) {
  *static_cast<int64_t*>(delta.count.mutable_data_ptr()) = count;
  *static_cast<uint64_t*>(delta.checksum.mutable_data_ptr()) = checksum;
}

// In a namespace of each file's own: host and device both define find_delta, and register the op that stands on it.
namespace {

// What differs between checked buckets, whose elements are compared as unsigned integers.
template <typename Value>
Delta find_delta(const Tensor& old_bucket, const Tensor& new_bucket, int64_t capacity);

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_delta(Tensor old_bucket, Tensor new_bucket, int64_t capacity) {
  check_buckets(old_bucket, new_bucket, capacity);
  const auto size = new_bucket.element_size();
  const auto find = size == 1 ? find_delta<uint8_t> : size == 2 ? find_delta<uint16_t> : find_delta<uint32_t>;
  const Delta delta = find(old_bucket, new_bucket, capacity);
  return {delta.indices, delta.values, delta.count, delta.checksum};
}

}  // namespace

}  // namespace grpo_fast
