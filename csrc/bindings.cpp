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
  library.def(
      "policy_loss(Tensor logprobs, Tensor? entropy, Tensor sequence_index, Tensor advantages, Tensor loss_weights, "
      "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? importance_weights, Tensor? token_mask, str surrogate, str level, "
      "float[] numbers, bool two_sided, bool bias_correction) -> (Tensor sums, Tensor coefficients)");
  library.def("ascends(Tensor index) -> bool");
  library.def(
      "group_advantage(Tensor rewards, str scale_rewards, bool leave_one_out, float epsilon) "
      "-> (Tensor advantages, Tensor zero_variance, Tensor mean, Tensor std)");
  library.def("few_rows_product(Tensor rows, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "decoder_layer(Tensor(a!) hidden, Tensor[] norms, float[] epsilons, Tensor[] weights, Tensor[] biases, "
      "Tensor[] lora_a, Tensor[] lora_b, Tensor cos, Tensor sin, Tensor source, Tensor padding, Tensor prefix_keys, "
      "Tensor prefix_values, Tensor(b!) keys, Tensor(c!) values, int position, float scale) -> ()");
  library.def("draw_tokens(Tensor logits, Tensor draws, float temperature) -> (Tensor tokens, Tensor logprobs)");
}
