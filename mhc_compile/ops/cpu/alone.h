// A mapping alone, without the pass over the streams: matrices [tokens, N, N] of logits [tokens, LOGITS], and the gradient.
#pragma once

namespace mhc {

template <typename T, int N>
inline void load_logits(const T* from, int64_t count, Family<T, N>& family) {
    for (int64_t lane = 0; lane < LANES; ++lane)
        for (int k = 0; k < Family<T, N>::LOGITS; ++k) family.at(k)[lane] = from[std::min(lane, count - 1) * Family<T, N>::LOGITS + k];
}

template <typename T, int N>
void forward_all(const T* logits, T* out, int64_t tokens, int64_t iterations, int64_t threads) {
    using Mapping = Family<T, N>;
    const int64_t blocks = (tokens + LANES - 1) / LANES;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        Mapping family;
        const int64_t at = b * LANES, count = std::min(LANES, tokens - at);
        load_logits(logits + at * Mapping::LOGITS, count, family);
        family.forward(iterations);
        store_matrices<Mapping::TURNED>(family.m, out + at * N * N, count);
    }
}

template <typename T, int N>
void backward_all(const T* grad, const T* logits, T* out, int64_t tokens, int64_t iterations, int64_t threads) {
    using Mapping = Family<T, N>;
    const int64_t blocks = (tokens + LANES - 1) / LANES;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<T> scratch(Mapping::SCRATCH(iterations));
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            Mapping family;
            T g[N][N][LANES];
            const int64_t at = b * LANES, count = std::min(LANES, tokens - at);
            load_logits(logits + at * Mapping::LOGITS, count, family);
            load_matrices<Mapping::TURNED>(grad + at * N * N, count, g);
            family.backward(g, iterations, scratch.data());
            for (int64_t lane = 0; lane < count; ++lane)
                for (int k = 0; k < Mapping::LOGITS; ++k) out[(at + lane) * Mapping::LOGITS + k] = family.gradient(k, g)[lane];
        }
    }
}

}  // namespace mhc

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void mapping_forward(const COMPUTE* a, COMPUTE* out, int64_t tokens, int64_t iterations, int64_t threads) {
    mhc::forward_all<COMPUTE, STREAMS>(a, out, tokens, iterations, threads);
}
EXPORT void mapping_backward(const COMPUTE* g, const COMPUTE* a, COMPUTE* out, int64_t tokens, int64_t iterations, int64_t threads) {
    mhc::backward_all<COMPUTE, STREAMS>(g, a, out, tokens, iterations, threads);
}
