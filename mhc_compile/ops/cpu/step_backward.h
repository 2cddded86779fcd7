// The backward of step.h, in one pass over the streams: the new streams X' are computed again from the old ones. With g the gradient of X',
// dh that of h, and dz that of the logits' projection (through sigmoid and mapping):
//
//     d_pre_j = <dh, X'_j>                     which is sum_l res_jl <dh, X_l> + post_j <dh, y>, so that X' is not needed before dz is known
//     G_i     = g_i + pre_i dh + sum_k (dz_k inverse) phi_ik - X'_i inverse^2 (sum_k dz_k z_k) / (N C)        the whole gradient of X'
//     d_phi   = X'^T (dz inverse),   d_X_l = sum_i res_il G_i,   d_y = sum_i post_i G_i,   d_post_i = <G_i, y>,   d_res_il = <G_i, X_l>
//
// Where h was read with GIVEN weights, dz is known from the gradients of pre, post and res, and d_pre is summed in the same walk as the others.
//
// Where h has a norm, the gradient that comes is that of the norm's result; dh of a tile is computed from it before all else, in the cache.
//
// Equations: mhc_compile/ops/reference.py. Gradients of the parameters are summed per thread, then over the threads in their order: the result does
// not depend on which thread is first.
#pragma once

namespace mhc {

struct Backward {
    const STORE *grad_out, *grad_h;                    // [T, N, C], [T, C]; null where nobody reads them
    const Real *grad_next_pre, *grad_next_post, *grad_next_res;  // [T, N], [T, N], [T, N, N]; null likewise; the first if GIVEN
    const STORE* streams;                              // [T, IN, C]
    const BRANCH* branch;                              // [T, C]
    const Real *post, *res, *pre;                      // the last if GIVEN
    Site site;
    const Real *next_pre, *next_post, *z, *inverse;    // what Forward gave
    STORE* d_streams;                                  // [T, IN, C]
    BRANCH* d_branch;
    Real *d_post, *d_res, *d_pre, *d_phi, *d_bias, *d_scale;
    int64_t T, C;
    Norm norm = {};
    const Real* moments = nullptr;
    Real *d_gain = nullptr, *d_shift = nullptr;

    // What a thread owns: its sums, of phi, of bias and scale, of gain and shift; scratch of the mapping, and of the norm a row and dh of a tile.
    struct Own {
        Real *phi, *bias, *gain, *shift, *history, *row, *d_h;
    };

    template <int IN, bool MIX, bool READ, bool GIVEN = false>
    void run(int64_t threads) const {
        tiles<MIX ? N : IN, READ>(threads, [this](int64_t first, const Term* packed, const Own& own) {
            one<IN, MIX, READ, GIVEN>(first, packed, own);
        });
    }

    // work(first token, packed phi of P streams, what the thread owns) for every tile, then the sums.
    template <int P, bool READ, typename Work>
    void tiles(int64_t threads, Work work) const {
        const int64_t all = READ ? chunks(C) * P * K * CHUNK : 0, count = (T + TILE - 1) / TILE;
        const int64_t width = norm.kind ? chunks(C) * CHUNK : 0, most = Mixing::SCRATCH(site.iterations);
        const int64_t sums = all + (READ ? K + 3 : 0) + 2 * width, scratch = most + (1 + TILE) * width;
        const Scratch packed(all), partial(threads * sums), rest(threads * scratch);
        Term* const terms = reinterpret_cast<Term*>(packed.at(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            if constexpr (READ) pack<P>(site.phi, C, terms, STEPS, [](Term* to, const Real* row, int k) { write_term(to, row, k); });
#pragma omp for schedule(static)
            for (int64_t thread = 0; thread < threads; ++thread) {
                Real *mine = partial.at(thread * sums), *last = mine + sums - 2 * width, *history = rest.at(thread * scratch);
                std::memset(mine, 0, sums * sizeof(Real));
                const Own own{mine, mine + all, last, last + width, history, history + most, history + most + width};
                for (int64_t tile = count * thread / threads; tile < count * (thread + 1) / threads; ++tile) work(tile * TILE, terms, own);
            }
            if constexpr (READ) {
#pragma omp for schedule(static)
                for (int64_t c = 0; c < C; ++c) {
                    for (int i = 0; i < P; ++i) {
                        for (int k = 0; k < K; ++k) {
                            Real total = 0;
                            for (int64_t thread = 0; thread < threads; ++thread) total += *partial.at(thread * sums + ((c / CHUNK * P + i) * K + k) * CHUNK + c % CHUNK);
                            for (int j = (P == 1 ? 0 : i); j <= (P == 1 ? N - 1 : i); ++j) d_phi[(j * C + c) * K + k] = total;
                        }
                    }
                }
            }
        }
        if constexpr (READ) {
            for (int k = 0; k < K + 3; ++k) {
                Real total = 0;
                for (int64_t thread = 0; thread < threads; ++thread) total += *partial.at(thread * sums + all + k);
                (k < K ? d_bias[k] : d_scale[k - K]) = k < K ? total : Real(SCALE_SPEED) * total;
            }
        }
        for (Real* d_norm : {d_gain, d_shift}) {
            const int64_t from = sums - (d_norm == d_gain ? 2 : 1) * width;
            for (int64_t c = 0; d_norm && c < C; ++c) {
                d_norm[c] = 0;
                for (int64_t thread = 0; thread < threads; ++thread) d_norm[c] += *partial.at(thread * sums + from + c);
            }
        }
    }

    template <int IN, bool MIX, bool READ, bool GIVEN>
    void one(int64_t first, const Term* packed, const Own& own) const {
        constexpr int P = MIX ? N : IN;
        const int64_t count = std::min<int64_t>(TILE, T - first);
        const STORE* d_h = grad_h ? grad_h + first * C : nullptr;
        if ((READ || GIVEN) && norm.kind && d_h) d_h = denormalize<IN, MIX>(first, count, GIVEN ? pre : next_pre, own);
        Outer<P> outer;
        Real radial[TILE] = {};
        if constexpr (READ) {
            Real d_next_pre[TILE][N] = {};
            for (int64_t t = 0; t < count; ++t) {
                if constexpr (!GIVEN) product<IN, MIX>(first + t, d_h ? d_h + t * C : nullptr, d_next_pre[t]);
                else if (grad_next_pre) std::memcpy(d_next_pre[t], grad_next_pre + (first + t) * N, sizeof d_next_pre[t]);
            }
            logits<P>(first, count, d_next_pre, outer.factors, radial, own);
            outer.begin(count);
        }
        Vec dots[TILE][N + GIVEN][IN + 1] = {};  // of the rows of G, and of dh, with X and y
        for (int64_t c0 = 0; c0 < C; c0 += CHUNK) {
            alignas(64) Real grads[TILE][P][CHUNK];  // what the projection gives to X'
            if constexpr (READ) outer.spread(packed, c0, grads);
            for (int64_t t = 0; t < count; ++t) {
                const STORE* row = d_h ? d_h + t * C : nullptr;
                if constexpr (MIX) mixed<IN, READ, GIVEN>(first, t, c0, row, radial[t], grads[t], outer, dots[t]);
                else read<IN>(first, t, c0, row, radial[t], grads[t], outer);
            }
            if constexpr (READ) outer.gather(own.phi, c0);
        }
        if constexpr (MIX) {
            for (int64_t t = 0; t < count; ++t) {
                const int64_t token = first + t;
                for (int i = 0; i < N; ++i) {
                    d_post[token * N + i] = sum(dots[t][i][IN]);
                    for (int l = 0; l < IN; ++l) d_res[(token * N + i) * N + l] = sum(dots[t][i][l]);
                    for (int l = IN; l < N; ++l) d_res[(token * N + i) * N + l] = d_res[(token * N + i) * N];
                }
                if constexpr (GIVEN) with_new<IN>(token, dots[t][N], d_pre + token * N);
            }
        }
    }

  protected:
    // From the gradients of pre, post and res to those of the logits: `factors` and `radial` of a tile, and the sums for bias, then scale.
    // A function of its own: inlined into the loops over the features it made the whole 6 % slower.
    template <int P>
    [[gnu::noinline]] void logits(int64_t first, int64_t count, const Real (*d_next_pre)[N], Real (*factors)[K], Real* radial, const Own& own) const {
        Real *d_bias_sum = own.bias, *d_scale_sum = d_bias_sum + K, d_logits[TILE][K];
        Mixing mixing;
        Real g[N][N][LANES];
        if (Mixing::LOGITS && grad_next_res) {
            for (int k = 0; k < Mixing::LOGITS; ++k)
                for (int64_t t = 0; t < TILE; ++t)
                    mixing.at(k)[t] = t < count ? site.logit(2 * N + k, z[(first + t) * K + 2 * N + k]) : 0;
            load_matrices<Mixing::TURNED>(grad_next_res + first * N * N, count, g);
            mixing.backward(g, site.iterations, own.history);
        }
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = first + t;
            for (int i = 0; i < N; ++i) {
                const Real pre = plus(next_pre[token * N + i], -PRE_PLUS), after = plus(next_post[token * N + i], -POST_PLUS);
                d_logits[t][i] = d_next_pre[t][i] * pre * (1 - pre);
                d_logits[t][N + i] = grad_next_post ? grad_next_post[token * N + i] * after * (1 - after / POST_TIMES) : 0;
            }
            for (int k = 0; k < Mixing::LOGITS; ++k) d_logits[t][2 * N + k] = grad_next_res ? mixing.gradient(k, g)[t] : 0;
            Real dot = 0;
            for (int k = 0; k < K; ++k) {
                const int part = k < N ? 0 : k < 2 * N ? 1 : 2;
                const Real d_sum = d_logits[t][k], dz = site.gain(k) * d_sum;
                d_bias_sum[k] += d_sum;  // not times GATE_SPEED: see reference.coefficients_backward
                d_scale_sum[part] += d_sum * z[token * K + k];
                dot += dz * z[token * K + k];
                factors[t][k] = dz * inverse[token];
            }
            radial[t] = inverse[token] * inverse[token] * dot / (P * C);
        }
    }

    // dh of a tile, of a norm's h.
    template <int IN, bool MIX>
    [[gnu::noinline]] const STORE* denormalize(int64_t first, int64_t count, const Real* weights_of_h, const Own& own) const {
        STORE* d_h = reinterpret_cast<STORE*>(own.d_h);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = first + t;
            Real weight[IN + 1] = {};
            for (int j = 0; j < N; ++j) {
                const Real pre_j = weights_of_h[token * N + j];
                if constexpr (MIX) {
                    weight[IN] += pre_j * post[token * N + j];
                    for (int l = 0; l < N; ++l) weight[IN == 1 ? 0 : l] += pre_j * res[(token * N + j) * N + l];
                } else {
                    weight[IN == 1 ? 0 : j] += pre_j;
                }
            }
            const auto at = [&](int64_t c, Vec (&source)[IN + 1]) {
                for (int l = 0; l < IN; ++l) source[l] = load(streams + (token * IN + l) * C + c, C - c);
                source[IN] = MIX ? load(branch + token * C + c, C - c) : Vec{};
            };
            norm.backward(weight, at, grad_h + token * C, moments + 2 * token, C, own.row, d_h + t * C, own.gain, own.shift);
        }
        return d_h;
    }

    // <dh, X'_j> for every j.
    template <int IN, bool MIX>
    void product(int64_t token, const STORE* d_h, Real* out) const {
        if (!d_h) return;
        Vec with[IN + 1] = {};
        for (int64_t c = 0; c < C; c += WIDTH) {
            const Vec dh = load(d_h + c, C - c);
            for (int l = 0; l < IN; ++l) with[l] += dh * load(streams + (token * IN + l) * C + c, C - c);
            if constexpr (MIX) with[IN] += dh * load(branch + token * C + c, C - c);
        }
        if constexpr (MIX) with_new<IN>(token, with, out);
        else
            for (int j = 0; j < N; ++j) out[j] = sum(with[IN == 1 ? 0 : j]);
    }

    // The same from <dh, X_l> and <dh, y>.
    template <int IN>
    void with_new(int64_t token, const Vec* with, Real* out) const {
        const Weights<IN> weights(res + token * N * N, post + token * N);
        Real old[IN + 1];
        for (int l = 0; l <= IN; ++l) old[l] = sum(with[l]);
        for (int j = 0; j < N; ++j) {
            out[j] = weights.post[j] * old[IN];
            for (int l = 0; l < IN; ++l) out[j] += weights.res[j][l] * old[l];
        }
    }

    template <int IN, bool READ, bool GIVEN>
    void mixed(int64_t first, int64_t t, int64_t c0, const STORE* d_h, Real radial, Real (*grads)[CHUNK], Outer<N>& outer, Vec (*dots)[IN + 1]) const {
        const int64_t token = first + t;
        const Weights<IN> weights(res + token * N * N, post + token * N);
        prefetch<IN>(streams, token, C, c0 + CHUNK);
        prefetch<1>(branch, token, C, c0 + CHUNK);
        if (grad_out) prefetch<N>(grad_out, token, C, c0 + CHUNK);
        prefetch<IN, 1>(d_streams, token, C, c0 + CHUNK);
        prefetch<1, 1>(d_branch, token, C, c0 + CHUNK);
        const Real* weight = (GIVEN ? pre : next_pre) + (READ || GIVEN ? token * N : 0);
        const auto source = [&](int64_t at, Vec (&x)[IN + 1]) {
            for (int l = 0; l < IN; ++l) x[l] = load(streams + (token * IN + l) * C + at, C - at);
            x[IN] = load(branch + token * C + at, C - at);
        };
        Vec of_h[IN + 1];
        for (int l = 0; GIVEN && l <= IN; ++l) of_h[l] = dots[N][l];
        for (int64_t c = 0; c < CHUNK; c += WIDTH) {
            const int64_t at = c0 + c, rest = C - at;
            Vec x[IN + 1], d_x[IN] = {}, d_y = {}, next[N];
            source(at, x);
            const Vec dh = (READ || GIVEN) && d_h ? load(d_h + at, rest) : Vec{};
            for (int l = 0; GIVEN && l <= IN; ++l) of_h[l] += dh * x[l];
            if constexpr (READ) weights.mix(x, x[IN], next);
            for (int i = 0; i < N; ++i) {
                Vec total = grad_out ? load(grad_out + (token * N + i) * C + at, rest) : Vec{};
                if constexpr (READ) {
                    const Vec value = rounded(next[i], grad_out);
                    store(outer.values[t][i] + c, value);
                    total += load(grads[i] + c) - radial * value;
                }
                if constexpr (READ || GIVEN) total += weight[i] * dh;
                d_y += weights.post[i] * total;
                for (int l = 0; l < IN; ++l) d_x[l] += weights.res[i][l] * total;
                store(grads[i] + c, total);
            }
            for (int l = 0; l < IN; ++l) store(d_streams + (token * IN + l) * C + at, d_x[l], rest);
            store(d_branch + token * C + at, d_y, rest);
        }
        for (int l = 0; GIVEN && l <= IN; ++l) dots[N][l] = of_h[l];
        add_dots(grads, [&](int64_t c, Vec (&x)[IN + 1]) { source(c0 + c, x); }, dots);
    }

    // dots[i][s] += <grads[i], source s> over a chunk, whose sources `at(c, sources)` loads: a walk of its own for as many rows as there are registers
    // for their sums.
    template <int S, int FROM = 0, typename At>
    static void add_dots(const Real (*grads)[CHUNK], At at, Vec (*dots)[S]) {
        if constexpr (FROM < N) {
            constexpr int MOST = std::max(1, (TOKENS * COLUMNS - 4) / S), ROWS = std::min(MOST, N - FROM);
            Vec sums[ROWS][S];
            for (int i = 0; i < ROWS; ++i)
                for (int s = 0; s < S; ++s) sums[i][s] = dots[FROM + i][s];
            for (int64_t c = 0; c < CHUNK; c += WIDTH) {
                Vec sources[S];
                at(c, sources);
                for (int i = 0; i < ROWS; ++i) {
                    const Vec row = load(grads[FROM + i] + c);
                    for (int s = 0; s < S; ++s) sums[i][s] += row * sources[s];
                }
            }
            for (int i = 0; i < ROWS; ++i)
                for (int s = 0; s < S; ++s) dots[FROM + i][s] = sums[i][s];
            add_dots<S, FROM + ROWS>(grads, at, dots);
        }
    }

    template <int IN>
    void read(int64_t first, int64_t t, int64_t c0, const STORE* d_h, Real radial, const Real (*grads)[CHUNK], Outer<IN>& outer) const {
        const int64_t token = first + t;
        prefetch<IN>(streams, token, C, c0 + CHUNK);
        prefetch<IN, 1>(d_streams, token, C, c0 + CHUNK);
        Real weight[IN] = {};
        for (int j = 0; j < N; ++j) weight[IN == 1 ? 0 : j] += next_pre[token * N + j];
        for (int64_t c = 0; c < CHUNK; c += WIDTH) {
            const int64_t at = c0 + c, rest = C - at;
            const Vec dh = d_h ? load(d_h + at, rest) : Vec{};
            for (int i = 0; i < IN; ++i) {
                const Vec value = load(streams + (token * IN + i) * C + at, rest);
                store(outer.values[t][i] + c, value);
                store(d_streams + (token * IN + i) * C + at, load(grads[i] + c) + weight[i] * dh - radial * value, rest);
            }
        }
    }
};

}  // namespace mhc
