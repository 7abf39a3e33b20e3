#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace rk {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_vnni"};

Isa newest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) {
    return Isa::kDefault;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? Isa::kAvx512Vnni : Isa::kAvx512;
  }
  return Isa::kAvx2;
#else
  return Isa::kDefault;
#endif
}

std::string parse(const std::string& name, Isa& out) {
  if (name.empty() || name == "auto") {
    out = newest();
    return "";
  }
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (name == kNames[i]) {
      if (i > static_cast<int>(newest())) {
        return "this processor has no " + name + "; its newest is " + kNames[static_cast<int>(newest())];
      }
      out = static_cast<Isa>(i);
      return "";
    }
  }
  return "expected one of auto, default, avx2, avx512, avx512_vnni; got '" + name + "'";
}

Isa from_environment() {
  const char* name = std::getenv("REFUSAL_KERNELS_CPU_ISA");
  Isa out = Isa::kDefault;
  const std::string problem = parse(name == nullptr ? "" : name, out);
  if (!problem.empty()) {
    throw std::runtime_error("REFUSAL_KERNELS_CPU_ISA: " + problem);
  }
  return out;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{from_environment()};
  return value;
}

}  // namespace

Isa isa() {
  return chosen();
}

const char* isa_name() {
  return kNames[static_cast<int>(isa())];
}

std::string set_isa(const std::string& name) {
  Isa out = Isa::kDefault;
  const std::string problem = parse(name, out);
  if (problem.empty()) {
    chosen() = out;
  }
  return problem;
}

}  // namespace rk
