// sae_adam_team.h on the CPU, for tests/test_cuda_adam.py: the launches of sae_adam.cu one team after another.
#include <exception>
#include <memory>

#include "sae_adam_team.h"

#include "emulated_team.h"

namespace {

using namespace rk::cuda;

// Shared memory of a team, which holds anything at the start.
template <int kIndex, class Work>
void in_a_team(bool reversed, const Work& work) {
  constexpr BackwardShape kShape = kBackwardShapes[kIndex];
  const size_t bytes = adam_team_bytes(kShape);
  auto* const memory = static_cast<unsigned char*>(std::aligned_alloc(16, bytes));
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  std::memset(memory, 0xff, bytes);
  Fibers::run(kShape.threads, [&] { work(memory); }, reversed);
}

template <class Row, int kIndex>
void run_shape(const AdamArgs& a, bool reversed) {
  using Team = EmulatedTeam<kBackwardShapes[kIndex].threads>;
  for (int program = 0; program < a.entries.segments; ++program) {
    in_a_team<kIndex>(reversed, [&](unsigned char* memory) {
      add_entries<Team, Row, kIndex, true, false>(a.entries, program, 0, memory);
    });
  }
  for (int64_t team = 0; team < static_cast<int64_t>(a.heads) * a.teams; ++team) {
    in_a_team<kIndex>(reversed, [&](unsigned char* memory) { step_latents<Team, Row, kIndex>(a, team, memory); });
  }
}

template <class Row>
void run_row(const AdamArgs& a, int shape, bool reversed) {
  switch (shape) {
    case 0:
      return run_shape<Row, 0>(a, reversed);
    case 1:
      return run_shape<Row, 1>(a, reversed);
    case 2:
      return run_shape<Row, 2>(a, reversed);
    case 3:
      return run_shape<Row, 3>(a, reversed);
    case 4:
      return run_shape<Row, 4>(a, reversed);
    default:
      return run_shape<Row, 5>(a, reversed);
  }
}

}  // namespace

extern "C" int32_t most_teams() {
  return kAdamTeams;
}

// What a call of the operator has, in structures of the test's. Null on success, else what went wrong.
struct State {
  void* weights;
  int16_t* low;
  void* m;
  void* v;
  void* copy;
  int64_t salt;
};
struct Call {
  const void *e, *x, *W_dec;
  const float *b_dec, *scale;
  const int32_t* tokens;
  const void* values;
  const int64_t *offsets, *ends, *segment_latent;
  float *part_enc, *part_db, *part_dec;
  State enc, dec;
  float *b_enc, *m_b, *v_b;
  const int64_t* position;
  const float *extra_enc, *extra_db, *extra_dec;
  float* through;
  int64_t type, rows, latents, segments, segment, d, heads, teams, positions, extra_rows, short_moments,
      remove_parallel, unit_norm, reversed;
  double step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, inverse_root_bc2;
  int64_t shape;  // out: which ran
};

extern "C" const char* emulate_sae_backward_adam(Call* c) {
  static char message[200];
  const auto integer = [](int64_t x) { return static_cast<int>(x); };
  const auto number = [](double x) { return static_cast<float>(x); };
  const RowType type = static_cast<RowType>(c->type);
  const auto state = [](const State& s) {
    return StateRows{s.weights, s.low, s.m, s.v, s.copy, static_cast<uint32_t>(s.salt)};
  };
  AdamArgs a{};
  BackwardArgs& b = a.entries;
  b.e = c->e, b.x = c->x, b.W_dec = c->W_dec, b.b_dec = c->b_dec, b.scale = c->scale, b.tokens = c->tokens;
  b.values = c->values, b.offsets = c->offsets, b.ends = c->ends, b.segment_latent = c->segment_latent;
  b.part_enc = c->part_enc, b.part_db = c->part_db, b.part_dec = c->part_dec;
  b.latents = integer(c->latents), b.segments = integer(c->segments), b.segment = integer(c->segment);
  b.head_latents = integer(c->latents / c->heads), b.d = integer(c->d), b.accumulate = false;
  a.enc = state(c->enc), a.dec = state(c->dec);
  a.b_enc = c->b_enc, a.m_b = c->m_b, a.v_b = c->v_b, a.position = c->position;
  a.extra_enc = c->extra_enc, a.extra_db = c->extra_db, a.extra_dec = c->extra_dec, a.through = c->through;
  a.positions = c->positions, a.extra_rows = c->extra_rows;
  a.heads = integer(c->heads), a.teams = integer(c->teams);
  a.short_moments = c->short_moments != 0, a.remove_parallel = c->remove_parallel != 0, a.unit_norm = c->unit_norm != 0;
  a.step_size = number(c->step_size), a.beta1 = number(c->beta1), a.one_minus_beta1 = number(c->one_minus_beta1);
  a.beta2 = number(c->beta2), a.one_minus_beta2 = number(c->one_minus_beta2), a.eps = number(c->eps);
  a.inverse_root_bc2 = number(c->inverse_root_bc2);
  if (!adam_takes(type, a)) return "not taken";
  c->shape = split_backward(c->d, type, true).shape;
  Fibers::readable.clear();
  const auto readable = [](const void* from, int64_t bytes) {
    const char* const begin = static_cast<const char*>(from);
    if (from != nullptr) Fibers::readable.emplace_back(begin, begin + bytes);
  };
  const int64_t elements = c->latents * c->d;
  for (const void* rows : {c->e, c->x}) readable(rows, c->rows * c->d * row_bytes(type));
  readable(c->W_dec, elements * row_bytes(type));
  for (const State* s : {&c->enc, &c->dec}) {
    readable(s->weights, elements * (s->low == nullptr ? 4 : 2));
    readable(s->low, elements * 2);
    readable(s->m, elements * (c->short_moments ? 2 : 4));
    readable(s->v, elements * (c->short_moments ? 2 : 4));
  }
  try {
    const int shape = integer(c->shape);
    if (type == RowType::kFloat32) {
      run_row<Float32Row>(a, shape, c->reversed != 0);
    } else if (type == RowType::kBFloat16) {
      run_row<BFloat16Row>(a, shape, c->reversed != 0);
    } else {
      run_row<Float16Row>(a, shape, c->reversed != 0);
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
  return nullptr;
}
