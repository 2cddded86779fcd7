// H_res = sum_k w_k P_k over all permutations in lexicographic order, w = softmax(z). With g the gradient of H: u_k = sum_i g[i, sigma_k(i)].
#pragma once

namespace mhc {

constexpr int factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }

// at[k][i] = sigma_k(i). Digit i of k in the factorial number system says how many of the smaller elements are still to come.
template <int N>
struct Table {
    int at[factorial(N)][N] = {};

    constexpr Table() {
        for (int k = 0; k < factorial(N); ++k) {
            for (int i = 0; i < N; ++i) at[k][i] = k / factorial(N - 1 - i) % (N - i);
            for (int i = N - 2; i >= 0; --i)
                for (int j = i + 1; j < N; ++j) at[k][j] += at[k][j] >= at[k][i];
        }
    }
};

template <typename T, int N>
struct Family {
    static constexpr int LOGITS = factorial(N);
    static constexpr bool TURNED = false;
    static constexpr Table<N> SIGMA{};
    T m[N][N][LANES], z[LOGITS][LANES], u[LOGITS][LANES];

    static int64_t SCRATCH(int64_t) { return 0; }
    T* at(int k) { return z[k]; }
    const T* gradient(int k, const T (&)[N][N][LANES]) const { return u[k]; }

    void forward(int64_t) {
        softmax(z);
        std::memset(m, 0, sizeof m);
        for (int k = 0; k < LOGITS; ++k)
            for (int i = 0; i < N; ++i) EACH_LANE m[i][SIGMA.at[k][i]][l] += z[k][l];
    }

    void backward(T (&g)[N][N][LANES], int64_t, T*) {
        softmax(z);
        for (int k = 0; k < LOGITS; ++k) {
            EACH_LANE u[k][l] = g[0][SIGMA.at[k][0]][l];
            for (int i = 1; i < N; ++i) EACH_LANE u[k][l] += g[i][SIGMA.at[k][i]][l];
        }
        softmax_back(z, u);
    }
};

}  // namespace mhc
