// Activations [N, k] transposed to a latent-major list by a stable counting sort: hits of a latent come in token order,
// so a gradient summed over them has the same bits on every run and for every number of threads.
#pragma once

#include "kernels.h"

namespace rk {

// Whether every index is in [0, F).
template <class I>
bool all_in_range(const I* indices, int64_t count, int64_t F);

// Smallest and largest index; (0, -1) for none.
template <class I>
void index_range(const I* indices, int64_t count, int64_t& low, int64_t& high);

// `skip_where_zero` [N, k] leaves out the activations whose value is 0 (null: keep all). N and k below 2^32, indices in
// [0, F). The list lives in the calling thread's scratch until its next call.
template <class R, class I>
LatentMajor latent_major(
    const I* indices, const R* skip_where_zero, int64_t N, int64_t k, int64_t F, const Threads& threads);

// The same of a CSR code, latents [offsets[N]] with offsets [N + 1]: a hit's slot is the number of its entry, below 2^32.
LatentMajor latent_major_csr(
    const int64_t* latents, const int64_t* offsets, int64_t N, int64_t F, const Threads& threads);

}  // namespace rk
