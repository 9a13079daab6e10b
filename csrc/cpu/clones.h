// Loops that are compiled for several instruction sets; the processor's own is chosen when the library loads.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define GRPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GRPO_CLONES
#endif
