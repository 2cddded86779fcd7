// The end of a chain: the mean of the new streams, which are never written. mean_i X'_i = sum_l (mean_i res_il) X_l + (mean_i post_i) y.
#pragma once

namespace mhc {

template <int IN>
struct Means {
    Real stream[IN] = {}, branch = 0;

    Means(const Real* res, const Real* post) {
        for (int i = 0; i < N; ++i) {
            branch += post[i] / N;
            for (int l = 0; l < N; ++l) stream[IN == 1 ? 0 : l] += res[i * N + l] / N;
        }
    }
};

template <int IN>
void close(const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, STORE* out, int64_t T, int64_t C, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const Means<IN> means(res + t * N * N, post + t * N);
        for (int64_t c = 0; c < C; c += WIDTH) {
            Vec total = means.branch * load(branch + t * C + c, C - c);
            for (int l = 0; l < IN; ++l) total += means.stream[l] * load(streams + (t * IN + l) * C + c, C - c);
            store(out + t * C + c, total, C - c);
        }
    }
}

// d_post_i = <g, y> / N and d_res_il = <g, X_l> / N, the same for every i.
template <int IN>
void close_backward(const STORE* grad, const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, STORE* d_streams,
                    BRANCH* d_branch, Real* d_post, Real* d_res, int64_t T, int64_t C, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const Means<IN> means(res + t * N * N, post + t * N);
        Vec with_streams[IN] = {}, with_branch = {};
        for (int64_t c = 0; c < C; c += WIDTH) {
            const Vec g = load(grad + t * C + c, C - c);
            with_branch += g * load(branch + t * C + c, C - c);
            store(d_branch + t * C + c, means.branch * g, C - c);
            for (int l = 0; l < IN; ++l) {
                with_streams[l] += g * load(streams + (t * IN + l) * C + c, C - c);
                store(d_streams + (t * IN + l) * C + c, means.stream[l] * g, C - c);
            }
        }
        for (int i = 0; i < N; ++i) {
            d_post[t * N + i] = sum(with_branch) / N;
            for (int l = 0; l < N; ++l) d_res[(t * N + i) * N + l] = sum(with_streams[IN == 1 ? 0 : l]) / N;
        }
    }
}

}  // namespace mhc
