/* Bit kernels of the xnorized capsule layers (spec capsule_xnor_heads 3 and 8): signs packed in bytes, products by XOR
 * and popcount, and the routing around them. Inference on the CPU in float32.
 *
 * B batch, N input capsules, d their dimension, J classes, D class capsule dimension. Bit k % 8 of byte k / 8 is set
 * where value k is > 0, so that sgn(0) = -1; bits behind the last value are 0. The products of n signs sum to
 * n - 2 popcount(a XOR b).
 *
 * For GCC and Clang, called through ctypes; no header of Python or torch. What is marked INLINE is compiled twice, with
 * and without `fast`; its plain loops are vectorised by the compiler.
 */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

#include "xnor.h"

#define EXPORT __attribute__((visibility("default")))
#define TILE 2 /* samples that share one pass over the weights */
#define MAX_THREADS 64
#define CACHE (8 << 20) /* bytes; predictions beyond it are written past the caches */

INLINE float dot(const float *a, const float *b, size_t size) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (size_t e = 0; e < size; e++) sum += a[e] * b[e];
    return sum;
}

INLINE float mean_abs(const float *x, size_t size) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (size_t e = 0; e < size; e++) sum += fabsf(x[e]);
    return sum / (float)size;
}

/* e^x for x <= 0: 2^n by the bits of the exponent, e^r by a polynomial (that of Cephes' expf) */
INLINE float exp_negative(float x) {
    x = x < -87.f ? -87.f : x;
    float n = (float)(int)(x * 1.44269504f - .5f), r = x - n * .693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) * (1 << 23)};
    return (p * r * r + r + 1.f) * power.value;
}

/* s[j] += softmax(logits)[j] u[j]; the coefficients go to c */
INLINE void attend(const float *logits, const float *u, float *c, float *s, size_t classes, size_t dim) {
    float max = logits[0], sum = 0.f;
#pragma omp simd reduction(max : max)
    for (size_t j = 0; j < classes; j++) max = logits[j] > max ? logits[j] : max;
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < classes; j++) sum += c[j] = exp_negative(logits[j] - max);
    for (size_t j = 0; j < classes; j++) {
        float factor = c[j] / sum;
        for (size_t e = 0; e < dim; e++) s[j * dim + e] += factor * u[j * dim + e];
    }
}

INLINE void squash(const float *s, float *v, size_t classes, size_t dim) {
    for (size_t j = 0; j < classes; j++) {
        float square = dot(s + j * dim, s + j * dim, dim), factor = sqrtf(square) / (1.f + square);
        for (size_t e = 0; e < dim; e++) v[j * dim + e] = s[j * dim + e] * factor;
    }
}

struct work {
    const float *x;      /* capsules (B, N, d); in XnIDR predictions (N, B, J, D), as torch.bmm gives them */
    const uint8_t *bits; /* signs of W (N, ceil(d / 8), J, D); NULL in XnIDR */
    const float *alpha;  /* scales of W (N, J, D) */
    float *out;          /* v (B, J, D); without iterations u_hat (B, N, J, D) */
    size_t batch, capsules, in_dim, classes, dim, iterations;
    int fast;
    uint8_t *signs; /* of x (B, N, ceil(d / 8)); NULL in XnIDR */
    float *k;       /* scales of x (B, N) */
};

INLINE void pack_capsules(int fast, const struct work *w, size_t in_dim, size_t first, size_t last) {
    for (size_t i = first * w->capsules; i < last * w->capsules; i++) {
        pack_signs(fast, w->x + i * in_dim, w->signs + i * ((in_dim + 7) / 8), 1, in_dim);
        w->k[i] = mean_abs(w->x + i * in_dim, in_dim);
    }
}

/* u_hat[b,i] = P K_x alpha for one sample and input capsule: (J, D), times `factor`. */
INLINE void predict(
        int fast, const struct work *w, size_t in_dim, size_t b, size_t i, float factor, int how, float *u) {
    size_t row = w->classes * w->dim, bytes = (in_dim + 7) / 8, at = b * w->capsules + i;
    for (size_t q = 0; q < bytes; q++) {
        int n = q + 1 < bytes ? 8 : (int)(in_dim - 8 * q);
        products(fast, w->bits + (i * bytes + q) * row, w->signs[at * bytes + q], n, factor * w->k[at],
                 w->alpha + i * row, q ? ADD : how, u, row);
    }
}

INLINE void project(int fast, const struct work *w, size_t in_dim, int how, size_t first, size_t last) {
    size_t row = w->classes * w->dim;
    for (size_t tile = first; tile < last; tile += TILE)
        for (size_t i = 0; i < w->capsules; i++)
            for (size_t b = tile; b < last && b < tile + TILE; b++)
                predict(fast, w, in_dim, b, i, 1.f, how, w->out + (b * w->capsules + i) * row);
    if (how == STREAM) STREAM_END();
}

/* XnODR: predictions are made in every iteration anew, (J, D) at a time, and not kept. */
INLINE int route_xnodr(int fast, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    size_t classes = w->classes, row = classes * dim, state = row + w->capsules * classes;
    float *u = malloc((row + classes + TILE * state) * sizeof(float));
    if (!u) return 1;
    float *c = u + row, *states = c + classes; /* of each sample: s (J, D), logits (N, J) */
    for (size_t tile = first; tile < last; tile += TILE) {
        size_t end = tile + TILE < last ? tile + TILE : last;
        memset(states, 0, TILE * state * sizeof(float));
        for (size_t t = 0; t < w->iterations; t++) {
            for (size_t b = tile; b < end; b++) memset(states + (b - tile) * state, 0, row * sizeof(float));
            for (size_t i = 0; i < w->capsules; i++)
                for (size_t b = tile; b < end; b++) {
                    float *s = states + (b - tile) * state, *logits = s + row + i * classes, *v = w->out + b * row;
                    if (t == 0) {
                        predict(fast, w, in_dim, b, i, 1.f / (float)classes, ADD, s);
                        continue;
                    }
                    predict(fast, w, in_dim, b, i, 1.f, STORE, u);
                    for (size_t j = 0; j < classes; j++) logits[j] += dot(u + j * dim, v + j * dim, dim);
                    attend(logits, u, c, s, classes, dim);
                }
            for (size_t b = tile; b < end; b++) squash(states + (b - tile) * state, w->out + b * row, classes, dim);
        }
    }
    free(u);
    return 0;
}

/* XnIDR: signs and scales of the predictions are taken once, with the first weighted sum. */
INLINE int route_xnidr(int fast, const struct work *w, size_t dim, size_t first, size_t last) {
    size_t classes = w->classes, row = classes * dim, edges = w->capsules * classes, bytes = (dim + 7) / 8;
    float *s = malloc((row + 2 * classes + 2 * edges) * sizeof(float) + (edges + classes) * bytes);
    if (!s) return 1;
    float *c = s + row, *v_scale = c + classes, *u_scales = v_scale + classes, *logits = u_scales + edges;
    uint8_t *u_bits = (uint8_t *)(logits + edges), *v_bits = u_bits + edges * bytes;
    for (size_t b = first; b < last; b++) {
        float *v = w->out + b * row;
        memset(logits, 0, edges * sizeof(float));
        for (size_t t = 0; t < w->iterations; t++) {
            memset(s, 0, row * sizeof(float));
            for (size_t i = 0; i < w->capsules; i++) {
                const float *u = w->x + (i * w->batch + b) * row;
                float *u_scale = u_scales + i * classes, *l = logits + i * classes;
                uint8_t *signs = u_bits + i * classes * bytes;
                if (t == 0) {
                    for (size_t e = 0; e < row; e++) s[e] += u[e] / (float)classes;
                    for (size_t j = 0; j < classes; j++) {
                        pack_signs(fast, u + j * dim, signs + j, classes, dim);
                        u_scale[j] = mean_abs(u + j * dim, dim);
                    }
                    continue;
                }
                for (size_t j = 0; j < classes; j++) {
                    int differing = 0;
                    for (size_t q = 0; q < bytes; q++) differing += ones(signs[q * classes + j] ^ v_bits[q * classes + j]);
                    l[j] += (float)((int)dim - 2 * differing) * (u_scale[j] * v_scale[j]);
                }
                attend(l, u, c, s, classes, dim);
            }
            squash(s, v, classes, dim);
            for (size_t j = 0; j < classes; j++) {
                pack_signs(fast, v + j * dim, v_bits + j, classes, dim);
                v_scale[j] = mean_abs(v + j * dim, dim);
            }
        }
    }
    free(s);
    return 0;
}

INLINE int run_xnodr(int fast, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    size_t bytes = w->classes * dim * sizeof(float);
    pack_capsules(fast, w, in_dim, first, last);
    if (w->iterations) return route_xnodr(fast, w, in_dim, dim, first, last);
    int aligned = !(bytes % 32) && !((uintptr_t)w->out % 32), large = w->batch * w->capsules * bytes > CACHE;
    if (in_dim <= 8 && aligned && large) project(fast, w, in_dim, STREAM, first, last);
    else project(fast, w, in_dim, STORE, first, last);
    return 0;
}

/* The papers' 8 and 16 dimensions are constants to the compiler. */
INLINE int run(int fast, const struct work *w, size_t first, size_t last) {
    if (!w->bits) return w->dim == 16 ? route_xnidr(fast, w, 16, first, last) : route_xnidr(fast, w, w->dim, first, last);
    if (w->in_dim == 8 && w->dim == 16) return run_xnodr(fast, w, 8, 16, first, last);
    return run_xnodr(fast, w, w->in_dim, w->dim, first, last);
}

TARGET static int run_fast(const struct work *w, size_t first, size_t last) { return run(1, w, first, last); }
static int run_portable(const struct work *w, size_t first, size_t last) { return run(0, w, first, last); }

struct share {
    const struct work *work;
    size_t first, last;
    int failed, started;
    pthread_t thread;
};

static void *run_share(void *argument) {
    struct share *s = argument;
    s->failed = (s->work->fast ? run_fast : run_portable)(s->work, s->first, s->last);
    return NULL;
}

/* Name of the best path of this build on this processor: "avx2", "neon" or "portable". */
EXPORT const char *xnor_path(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "portable";
#endif
    return FAST;
}

/* Predictions of XnODR without iterations, XnIDR's routing without bits, else XnODR's; shapes as in struct work.
 * Each thread takes a range of the batch. Threads start and end here: forks and other thread pools are no concern.
 * Returns 0, or 1 if memory ran out. */
EXPORT int xnor_run(
        const float *x, const uint8_t *bits, const float *alpha, float *out, size_t batch, size_t capsules,
        size_t in_dim, size_t classes, size_t dim, size_t iterations, int fast, size_t threads) {
    struct work work = {x, bits, alpha, out, batch, capsules, in_dim, classes, dim, iterations, fast, NULL, NULL};
    struct share shares[MAX_THREADS] = {0};
    size_t count = threads < MAX_THREADS ? threads : MAX_THREADS, inputs = batch * capsules;
    int failed = 0;
    if (bits) {
        work.k = malloc(inputs * sizeof(float) + inputs * ((in_dim + 7) / 8));
        if (!work.k) return 1;
        work.signs = (uint8_t *)(work.k + inputs);
    }
    if (count > batch) count = batch;
    for (size_t k = 0; k < count; k++) {
        struct share *s = &shares[k];
        s->work = &work, s->first = batch * k / count, s->last = batch * (k + 1) / count;
        s->started = k + 1 < count && !pthread_create(&s->thread, NULL, run_share, s);
        if (!s->started) run_share(s);
    }
    for (size_t k = 0; k < count; k++) {
        if (shares[k].started) pthread_join(shares[k].thread, NULL);
        failed |= shares[k].failed;
    }
    free(work.k);
    return failed;
}
