// Schemas of the extension's ops. Kernels register beside their code: cpu/*.cpp, cuda/*.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_fast, library) {
  library.def(
      "pack_weights(Tensor[] weights, Tensor(a!) bucket, int[] offsets, int[] formats, "
      "Tensor[] lora_a, Tensor[] lora_b, float[] lora_scales) -> ()");
  library.def("unpack_weights(Tensor bucket, Tensor(a!)[] weights, int[] offsets, int[] formats) -> ()");
  library.def(
      "weight_delta(Tensor old, Tensor new, int capacity) -> (Tensor indices, Tensor values, Tensor count, Tensor checksum)");
  library.def("pack_sequences(Tensor lengths, int token_budget) -> (Tensor order, Tensor bin_starts)");
  library.def(
      "packed_index(Tensor prompts, Tensor sizes, Tensor completions, Tensor segment_starts) "
      "-> (Tensor cu_seqlens, Tensor positions, Tensor row_index, Tensor sequence_index)");
}
