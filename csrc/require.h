// Errors that Python sees as RuntimeError with these very words.
#pragma once

#include <sstream>
#include <stdexcept>

namespace grpo_fast {

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }
}

}  // namespace grpo_fast
