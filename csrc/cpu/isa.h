// Which instruction set the kernels run on: the newest that this processor and this build have, unless
// REFUSAL_KERNELS_CPU_ISA (read once) or set_isa names an older one.
#pragma once

#include <string>

namespace rk {

enum class Isa { kDefault, kAvx2, kAvx512, kAvx512Vnni };

Isa isa();
const char* isa_name();

// "default", "avx2", "avx512", "avx512_vnni", or "auto" for the newest. Returns what is wrong with the name, empty if it took effect.
std::string set_isa(const std::string& name);

}  // namespace rk
