/* One pass over memory for one blend: see methods/blend.py, whose bits this repeats, and kernels.py.

   Compiled once per shape of a blend, with
     SOURCES(S)  S(0, F, D) S(1, F, D) ...   format of each source; D: 1 where the base is subtracted from it
     K           how many
     BASE        format of the base, where something is subtracted from or added to: else undefined
     ADD         the base is added to the result
     RANKED, TOP magnitudes from a boundary on are kept (and, TOP, those from a higher one on are not)
     DRAWN       elements are kept at random
     ELECT, MEAN elements of the majority sign alone; their mean
     OUT         format of the result; ROUND: rounded to bfloat16 first
     GUARD       share of the weights' size below which a divisor counts as 0
   No fused multiply-adds, no reordering: -ffp-contract=off, and never -ffast-math. */

#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define UNROLL _Pragma("GCC unroll 16")
#define BLOCK 2048 /* draws.CHUNK: the halves of a hash belong to the halves of a block */
#define GRAM_BLOCK 16384
#define LANES 16
#define MANY ((i64)1 << 62)
#define MOST_SHARES 4 /* sources up to which the reciprocals of all sums of weights are made beforehand */

typedef u16 bf16_t;
typedef float f32_t;

static inline u32 as_bits(float x) { u32 u; memcpy(&u, &x, 4); return u; }
static inline float as_float(u32 u) { float x; memcpy(&x, &u, 4); return x; }
static inline float read_bf16(u16 x) { return as_float((u32)x << 16); }
static inline float read_f32(float x) { return x; }
static inline u32 round_bf16(u32 u) { return (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u; }
static inline float size_of(float x) { return as_float(as_bits(x) & 0x7fffffffu); }

#ifdef ROUND
#define ROUNDED(u) round_bf16(u)
#define LEAST_INFINITE 0x7f7f8000u /* rounds to infinity; above it are infinity and NaN, which rounding may lose */
#else
#define ROUNDED(u) (u)
#define LEAST_INFINITE 0x7f800000u
#endif
static inline u16 write_bf16(u32 u) { return (u16)(u >> 16); }
static inline float write_f32(u32 u) { return as_float(u); }

#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
#define READ(format, x) GLUE(read_, format)(x)
#define TYPE(format) GLUE(format, _t)

static inline u32 hashed(u32 x, u64 key) {
    x ^= (u32)key;
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x += (u32)(key >> 32);
    x *= 0xd35a2d97u;
    return x ^ (x >> 15);
}

typedef struct {
    float weight, size, factor;
    float limit, top;      /* magnitudes of the boundaries; NaN: there is none */
    i64 ties, top_ties;    /* how many elements equal to them are above them, from the lowest index on: at least 1 */
    u64 key;
    u32 share;
} source_t;

/* The result of one element from its K task vectors (or model weights), dropped ones 0. */
static inline float blended(const float *restrict d, const source_t *restrict s, float base, float scale,
                            const float *restrict shares) {
    float p[K], mix;
    UNROLL for (int k = 0; k < K; k++) p[k] = d[k] * s[k].weight;
    mix = p[0];
    UNROLL for (int k = 1; k < K; k++) mix += p[k];
#ifdef ELECT
    u32 sign = as_bits(mix) & 0x80000000u;
    int part[K];
    mix = 0.0f;
    UNROLL for (int k = 0; k < K; k++) {
        float agreeing = as_float(as_bits(p[k]) ^ sign);
        part[k] = agreeing > 0.0f;
        mix += agreeing < 0.0f ? 0.0f : agreeing; /* NaN passes */
    }
    mix = as_float(as_bits(mix) ^ sign);
#ifdef MEAN
#if K <= MOST_SHARES
    float share[1 << K];
    UNROLL for (int j = 0; j < 1 << K; j++) share[j] = shares[j];
    UNROLL for (int k = 0; k < K; k++)
        UNROLL for (int j = 0; j < 1 << (K - 1 - k); j++) share[j] = part[k] ? share[2 * j + 1] : share[2 * j];
    mix *= share[0];
#else
    float divisor = 0.0f, size = 0.0f;
    UNROLL for (int k = 0; k < K; k++) {
        divisor += part[k] ? s[k].weight : 0.0f;
        size += part[k] ? s[k].size : 0.0f;
    }
    mix *= size_of(divisor) <= size * GUARD ? 1.0f : 1.0f / divisor;
#endif
#endif
#endif
    mix *= scale;
#ifdef ADD
    mix += base;
#endif
    return mix;
}

#ifdef BASE
#define LOAD_BASE float b = READ(BASE, base[i]);
#define POINT_BASE const TYPE(BASE) *restrict base = (const TYPE(BASE) *)base_ + start;
#else
#define LOAD_BASE float b = 0.0f;
#define POINT_BASE
#endif
#define POINT(k, format, delta) const TYPE(format) *restrict x##k = (const TYPE(format) *)x_[k] + start;
#define TAKE(k, format, delta) d[k] = (delta) ? READ(format, x##k[i]) - b : READ(format, x##k[i]);

#ifdef OUT
/* Returns 1 where a result is not finite. `sources` is used up: boundaries move past their ties. */
int blend(i64 n, const void *base_, const void *const *x_, source_t *sources, float scale, void *out_) {
    u32 bad = 0;
    float shares[1 << MOST_SHARES] = {0};
    for (int j = 0; K <= MOST_SHARES && j < 1 << K; j++) { /* of the sources in the bits of j */
        float divisor = 0.0f, size = 0.0f;
        for (int k = 0; k < K; k++) {
            divisor += j >> k & 1 ? sources[k].weight : 0.0f;
            size += j >> k & 1 ? sources[k].size : 0.0f;
        }
        shares[j] = size_of(divisor) <= size * GUARD ? 1.0f : 1.0f / divisor;
    }
    for (i64 start = 0; start < n; start += BLOCK) {
        const i64 m = n - start < BLOCK ? n - start : BLOCK;
        POINT_BASE
        SOURCES(POINT)
        TYPE(OUT) *restrict out = (TYPE(OUT) *)out_ + start;
#ifdef DRAWN
        u16 draws[K][BLOCK];
        UNROLL for (int k = 0; k < K; k++)
            for (int j = 0; j < BLOCK / 2; j++) {
                u32 h = hashed((u32)(start / 2) + j, sources[k].key);
                draws[k][j] = (u16)h;
                draws[k][j + BLOCK / 2] = (u16)(h >> 16);
            }
#endif
        for (i64 from = 0, to = m; from < m;) {
            source_t s[K];
            memcpy(s, sources, sizeof s);
            u32 not_finite = 0;
#ifdef RANKED
            u32 equal[K] = {0}, top_equal[K] = {0};
#endif
            for (i64 i = from; i < to; i++) {
                float d[K];
                LOAD_BASE
                SOURCES(TAKE)
                (void)b;
                UNROLL for (int k = 0; k < K; k++) {
#ifdef RANKED
                    float size = size_of(d[k]);
                    equal[k] += size == s[k].limit;
                    d[k] = size < s[k].limit ? 0.0f : d[k];
#ifdef TOP
                    top_equal[k] += size == s[k].top;
                    d[k] = size >= s[k].top ? 0.0f : d[k];
#endif
#endif
#ifdef DRAWN
                    d[k] = draws[k][i] < s[k].share ? d[k] * s[k].factor : 0.0f;
#endif
                }
                u32 exact = as_bits(blended(d, s, b, scale, shares));
                not_finite |= (exact & 0x7fffffffu) >= LEAST_INFINITE;
                out[i] = GLUE(write_, OUT)(ROUNDED(exact));
            }
#ifdef RANKED
            /* All ties here were taken as above their boundary. Where one has run out, go only as far again. */
            int run_out = 0;
            UNROLL for (int k = 0; k < K; k++)
                run_out |= equal[k] > sources[k].ties || top_equal[k] > sources[k].top_ties;
            if (run_out) {
                i64 used[K] = {0}, top_used[K] = {0};
                for (i64 i = from; i < to; i++) {
                    float d[K];
                    LOAD_BASE
                    SOURCES(TAKE)
                    (void)b;
                    for (int k = 0; k < K; k++) {
                        used[k] += size_of(d[k]) == s[k].limit;
                        top_used[k] += size_of(d[k]) == s[k].top;
                        if (used[k] > s[k].ties || top_used[k] > s[k].top_ties) to = i;
                    }
                }
                continue;
            }
            for (int k = 0; k < K; k++) { /* none left: from here on only larger magnitudes are above */
                sources[k].ties -= equal[k];
                sources[k].top_ties -= top_equal[k];
                if (sources[k].ties == 0) {
                    sources[k].limit = as_float(as_bits(sources[k].limit) + 1);
                    sources[k].ties = MANY;
                }
                if (sources[k].top_ties == 0) {
                    sources[k].top = as_float(as_bits(sources[k].top) + 1);
                    sources[k].top_ties = MANY;
                }
            }
#endif
            bad |= not_finite;
            from = to;
            to = m;
        }
    }
    return bad != 0;
}
#else
/* sums: (blocks, K (K + 1) / 2), the lower triangle row by row; order as in methods/reduction.py. */
int gram(i64 n, const void *base_, const void *const *x_, double *sums) {
    for (i64 start = 0; start < n; start += GRAM_BLOCK, sums += K * (K + 1) / 2) {
        const i64 m = n - start < GRAM_BLOCK ? n - start : GRAM_BLOCK;
        double lanes[K * (K + 1) / 2][LANES] = {{0}};
        POINT_BASE
        SOURCES(POINT)
        for (i64 row = 0; row < m; row += LANES) {
            double v[K][LANES] = {{0}};
            const i64 end = m - row < LANES ? m - row : LANES;
            for (i64 l = 0; l < end; l++) {
                const i64 i = row + l;
                float d[K];
                LOAD_BASE
                SOURCES(TAKE)
                (void)b;
                UNROLL for (int k = 0; k < K; k++) v[k][l] = d[k];
            }
            for (int i = 0, pair = 0; i < K; i++)
                for (int j = 0; j <= i; j++, pair++)
                    for (int l = 0; l < LANES; l++) lanes[pair][l] += v[i][l] * v[j][l];
        }
        for (int pair = 0; pair < K * (K + 1) / 2; pair++) {
            double total = lanes[pair][0];
            for (int l = 1; l < LANES; l++) total += lanes[pair][l];
            sums[pair] = total;
        }
    }
    return 0;
}
#endif
