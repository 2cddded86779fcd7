// The functions that Python calls. Pointers in the order of the operators' arguments, then sizes, iterations, threads, eps.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
#define PER_INPUT(call) \
    if (in == 1) { constexpr int IN = 1; call; } else { constexpr int IN = STREAMS; call; }

using mhc::Real;

EXPORT void mhc_read(const STORE* streams, const Real* phi, const Real* bias, const Real* scale, STORE* h, Real* pre, Real* post, Real* res, Real* z,
                     Real* inverse, int64_t T, int64_t C, int64_t in, int64_t iterations, int64_t threads, double eps) {
    const mhc::Forward forward{streams, nullptr, nullptr, nullptr, {phi, bias, scale, Real(eps), iterations}, nullptr, h, pre, post, res, z, inverse, T, C};
    PER_INPUT((forward.run<IN, false, true>(threads)))
}

EXPORT void mhc_step(const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, const Real* phi, const Real* bias, const Real* scale,
                     STORE* out, STORE* h, Real* next_pre, Real* next_post, Real* next_res, Real* z, Real* inverse, int64_t T, int64_t C, int64_t in,
                     int64_t iterations, int64_t threads, double eps) {
    const mhc::Forward forward{streams, branch, post, res, {phi, bias, scale, Real(eps), iterations}, out, h, next_pre, next_post, next_res, z, inverse, T, C};
    PER_INPUT((forward.run<IN, true, true>(threads)))
}

EXPORT void mhc_update(const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, STORE* out, int64_t T, int64_t C, int64_t in,
                       int64_t, int64_t threads, double) {
    const mhc::Forward forward{streams, branch, post, res, {}, out, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, T, C};
    PER_INPUT((forward.run<IN, true, false>(threads)))
}

EXPORT void mhc_close(const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, STORE* out, int64_t T, int64_t C, int64_t in,
                      int64_t, int64_t threads, double) {
    PER_INPUT((mhc::close<IN>(streams, branch, post, res, out, T, C, threads)))
}

EXPORT void mhc_read_backward(const STORE* grad_h, const Real* grad_post, const Real* grad_res, const STORE* streams, const Real* phi, const Real* bias,
                              const Real* scale, const Real* pre, const Real* post, const Real* z, const Real* inverse, STORE* d_streams, Real* d_phi,
                              Real* d_bias, Real* d_scale, int64_t T, int64_t C, int64_t in, int64_t iterations, int64_t threads, double) {
    const mhc::Backward backward{nullptr, grad_h, grad_post, grad_res, streams, nullptr, nullptr, nullptr, {phi, bias, scale, 0, iterations}, pre, post,
                                 z, inverse, d_streams, nullptr, nullptr, nullptr, d_phi, d_bias, d_scale, T, C};
    PER_INPUT((backward.run<IN, false, true>(threads)))
}

EXPORT void mhc_step_backward(const STORE* grad_out, const STORE* grad_h, const Real* grad_post, const Real* grad_res, const STORE* streams,
                              const BRANCH* branch, const Real* post, const Real* res, const Real* phi, const Real* bias, const Real* scale,
                              const Real* next_pre, const Real* next_post, const Real* z, const Real* inverse, STORE* d_streams, BRANCH* d_branch,
                              Real* d_post, Real* d_res, Real* d_phi, Real* d_bias, Real* d_scale, int64_t T, int64_t C, int64_t in, int64_t iterations,
                              int64_t threads, double) {
    const mhc::Backward backward{grad_out, grad_h, grad_post, grad_res, streams, branch, post, res, {phi, bias, scale, 0, iterations}, next_pre, next_post,
                                 z, inverse, d_streams, d_branch, d_post, d_res, d_phi, d_bias, d_scale, T, C};
    PER_INPUT((backward.run<IN, true, true>(threads)))
}

EXPORT void mhc_update_backward(const STORE* grad, const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, STORE* d_streams,
                                BRANCH* d_branch, Real* d_post, Real* d_res, int64_t T, int64_t C, int64_t in, int64_t, int64_t threads, double) {
    const mhc::Backward backward{grad, nullptr, nullptr, nullptr, streams, branch, post, res, {nullptr, nullptr, nullptr, 0, 1}, nullptr, nullptr, nullptr,
                                 nullptr, d_streams, d_branch, d_post, d_res, nullptr, nullptr, nullptr, T, C};
    PER_INPUT((backward.run<IN, true, false>(threads)))
}

EXPORT void mhc_close_backward(const STORE* grad, const STORE* streams, const BRANCH* branch, const Real* post, const Real* res, STORE* d_streams,
                               BRANCH* d_branch, Real* d_post, Real* d_res, int64_t T, int64_t C, int64_t in, int64_t, int64_t threads, double) {
    PER_INPUT((mhc::close_backward<IN>(grad, streams, branch, post, res, d_streams, d_branch, d_post, d_res, T, C, threads)))
}
