// What a delta is made of, and what two buckets must have in common.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "require.h"

namespace grpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Delta {
  Tensor indices;   // int32 [capacity], ascending
  Tensor values;    // of the buckets' dtype, [capacity]
  Tensor count;     // int64 [1]: how many changed, also where they were too many to be written
  Tensor checksum;  // int64 [1], of the new bucket
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

inline Delta new_delta(const Tensor& like, int64_t capacity) {
  const auto device = like.device();
  return {
      torch::stable::empty({capacity}, ScalarType::Int, std::nullopt, device),
      torch::stable::empty({capacity}, like.scalar_type(), std::nullopt, device),
      torch::stable::empty({1}, ScalarType::Long, std::nullopt, device),
      torch::stable::empty({1}, ScalarType::Long, std::nullopt, device),
  };
}

}  // namespace grpo_fast
