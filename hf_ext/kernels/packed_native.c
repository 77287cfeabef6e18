/* The two products of attention over packed codes; see packed_torch.py, whose results these are, and packing.py for the
 * layout: byte b of a token holds channel b in its lowest bits, channel b + bytes in the next ones, and so on.
 *
 * Vectors are those of GCC and clang, as wide as the registers of the machine: nothing here is for one processor only.
 * A run of codes becomes floating numbers in registers and is multiplied by up to four lines there; no unpacked number
 * is ever written to memory. Lines are the queries that see the same keys. All functions return 0, or 1 if the shape is
 * none that they take, and then have done nothing. Strides are in elements.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__) || defined(__aarch64__)
#define W 8
#else
#define W 4 /* works, but is slower than what PyTorch finds for the processor as the program runs */
#endif
#define LINES 4          /* at once */
#define MOST_WIDTH 1024  /* of a head */
#define WORTH 65536      /* multiplications of codes that are worth waking other threads */
#define INLINE static inline __attribute__((always_inline))

typedef float real __attribute__((vector_size(4 * W)));
typedef int32_t whole __attribute__((vector_size(4 * W)));
typedef uint32_t wholes __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));
typedef uint8_t bytes __attribute__((vector_size(W)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef int32_t places __attribute__((vector_size(16)));

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

INLINE real load(const float *from) {
    real found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* Numbers of a vector. */
int packed_lanes(void) { return W; }

/* Bytes as numbers of 32 bits: where the compiler does not find the one instruction, it is named. */
INLINE whole load_bytes(const uint8_t *from) {
#if defined(__AVX512F__)
    return (whole)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (whole)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    bytes found;
    memcpy(&found, from, sizeof found);
    return (whole)__builtin_convertvector(__builtin_convertvector(found, halves), wholes);
#endif
}

/* The codes of one plane of some bytes. */
INLINE real codes_of(whole some, int plane, int bits) {
    whole codes = some >> (plane * bits);
    return __builtin_convertvector((plane + 1) * bits < 8 ? codes & ((1 << bits) - 1) : codes, real);
}

INLINE int code_of(uint8_t byte, int plane, int bits) { return byte >> (plane * bits) & ((1 << bits) - 1); }

/* A vector halved until four numbers are left. */
INLINE four halved(real from) {
#if W == 16
    eight part[2];
    memcpy(part, &from, sizeof part);
    part[0] += part[1];
#elif W == 8
    eight part[1] = {from};
#endif
#if W > 4
    four quarter[2];
    memcpy(quarter, part, sizeof quarter);
    return quarter[0] + quarter[1];
#else
    return from;
#endif
}

/* The sum of the numbers of each of some vectors. */
INLINE void add_up(const real *from, const int count, float *out) {
    four left[LINES];
    for (int one = 0; one < count; one++) left[one] = halved(from[one]);
    if (count == 4) {
        const four low = PICK(left[0], left[1], 0, 4, 1, 5) + PICK(left[0], left[1], 2, 6, 3, 7);
        const four high = PICK(left[2], left[3], 0, 4, 1, 5) + PICK(left[2], left[3], 2, 6, 3, 7);
        const four all = PICK(low, high, 0, 1, 4, 5) + PICK(low, high, 2, 3, 6, 7);
        memcpy(out, &all, sizeof all);
    } else {
        for (int one = 0; one < count; one++) out[one] = (left[one][0] + left[one][2]) + (left[one][1] + left[one][3]);
    }
}

/* Scores of a group of tokens for `lines` lines. Where the bytes of a token are no multiple of a vector, its last run
 * begins earlier, and the lines are 0 where it repeats what the run before it had. */
INLINE void scores_of(const float *query, const uint8_t *codes, const float *scale, const float *zero, float *out,
                      int64_t out_line, int64_t group, int64_t part, const int lines, const int bits) {
    const int planes = 8 / bits;
    const int64_t runs = (part + W - 1) / W, width = part * planes;
    float scaled[LINES * (MOST_WIDTH + (8 / 2) * W)] __attribute__((aligned(64)));
    real sums[LINES];
    for (int line = 0; line < lines; line++) sums[line] = (real){0};
    for (int64_t run = 0; run < runs; run++) {
        const int64_t first = run + 1 < runs ? run * W : part - W;
        whole fresh;
        for (int i = 0; i < W; i++) fresh[i] = first + i < run * W ? 0 : -1;
        for (int plane = 0; plane < planes; plane++) {
            const int64_t channel = plane * part + first;
            const real by = load(scale + channel), start = load(zero + channel);
            for (int line = 0; line < lines; line++) {
                const real own = (real)((whole)load(query + line * width + channel) & fresh);
                const real product = own * by;
                memcpy(scaled + ((run * planes + plane) * lines + line) * W, &product, sizeof product);
                sums[line] += own * start;
            }
        }
    }
    float least[LINES];
    add_up(sums, lines, least);
    for (int64_t token = 0; token < group; token++) {
        const uint8_t *own = codes + token * part;
        real total[LINES];
        for (int line = 0; line < lines; line++) total[line] = (real){0};
        for (int64_t run = 0; run < runs; run++) {
            const whole some = load_bytes(own + (run + 1 < runs ? run * W : part - W));
            for (int plane = 0; plane < planes; plane++) {
                const real numbers = codes_of(some, plane, bits);
                const float *by = scaled + (run * planes + plane) * lines * W;
                for (int line = 0; line < lines; line++) total[line] += numbers * load(by + line * W);
            }
        }
        float found[LINES];
        add_up(total, lines, found);
        for (int line = 0; line < lines; line++) out[line * out_line + token] = found[line] + least[line];
    }
}

/* The same where a token has fewer bytes than a vector. */
static void scores_of_few(const float *query, const uint8_t *codes, const float *scale, const float *zero, float *out,
                          int64_t out_line, int64_t group, int64_t part, int lines, int bits) {
    const int planes = 8 / bits;
    for (int line = 0; line < lines; line++)
        for (int64_t token = 0; token < group; token++) {
            float sum = 0;
            for (int plane = 0; plane < planes; plane++)
                for (int64_t byte = 0; byte < part; byte++) {
                    const int64_t channel = plane * part + byte;
                    const int code = code_of(codes[token * part + byte], plane, bits);
                    const float number = zero[channel] + code * scale[channel];
                    sum += query[line * part * planes + channel] * number;
                }
            out[line * out_line + token] = sum;
        }
}

#define BY_LINES(function, bits, ...)                                  \
    (lines >= 4 ? (function(__VA_ARGS__, 4, bits), 4)                  \
     : lines >= 2 ? (function(__VA_ARGS__, 2, bits), 2)                \
                  : (function(__VA_ARGS__, 1, bits), 1))
#define BY_BITS(function, ...)                                         \
    (bits == 2 ? BY_LINES(function, 2, __VA_ARGS__)                    \
     : bits == 4 ? BY_LINES(function, 4, __VA_ARGS__)                  \
                 : BY_LINES(function, 8, __VA_ARGS__))

/* query (heads, lines, width); codes (heads, groups * group, part); scale and zero (heads, groups, width);
 * out (heads, lines, groups * group), written to. */
int packed_scores(const float *query, const uint8_t *codes, int64_t codes_head, const float *scale, int64_t scale_head,
                  const float *zero, int64_t zero_head, float *out, int64_t out_head, int64_t out_line, int64_t heads,
                  int64_t all_lines, int64_t groups, int64_t group, int64_t part, int bits, int threads) {
    const int64_t width = part * (8 / bits);
    if (width > MOST_WIDTH) return 1;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1 && heads * groups * group * width > WORTH)
    for (int64_t head = 0; head < heads; head++)
        for (int64_t some = 0; some < groups; some++) {
            const float *own = query + head * all_lines * width, *by = scale + head * scale_head + some * width;
            const float *start = zero + head * zero_head + some * width;
            const uint8_t *from = codes + head * codes_head + some * group * part;
            float *to = out + head * out_head + some * group;
            for (int64_t line = 0; line < all_lines;) {
                const int64_t lines = all_lines - line;
                if (part < W) {
                    scores_of_few(own, from, by, start, to, out_line, group, part, (int)lines, bits);
                    break;
                }
                line += BY_BITS(scores_of, own + line * width, from, by, start, to + line * out_line, out_line, group,
                                part);
            }
        }
    return 0;
}

/* Sums of all tokens, of one run of bytes, in `planes` planes from `plane` on: so many that sums stay in registers. */
INLINE void sums_of(const float *weights, int64_t weights_line, const uint8_t *codes, const float *scale,
                    const float *zero, int64_t groups, const int64_t *of_group, float *out, int64_t width,
                    int64_t tokens, int64_t part, int known, int plane, const int lines, const int bits) {
    const int planes = bits == 8 ? 1 : 2;
    real total[2][LINES];
    for (int each = 0; each < planes; each++)
        for (int line = 0; line < lines; line++) total[each][line] = (real){0};
    for (int64_t token = 0; token < tokens; token++) {
        const whole some = load_bytes(codes + token * part) >> (plane * bits);
        for (int each = 0; each < planes; each++) {
            const int64_t at = token * groups + of_group[each];
            const real numbers = __builtin_convertvector(some >> (each * bits) & ((1 << bits) - 1), real);
            const real values = numbers * scale[at] + zero[at];
            for (int line = 0; line < lines; line++) total[each][line] += values * weights[line * weights_line + token];
        }
    }
    for (int each = 0; each < planes; each++)
        for (int line = 0; line < lines; line++) {
            float found[W];
            memcpy(found, &total[each][line], sizeof found);
            memcpy(out + line * width + (plane + each) * part + known, found + known, sizeof(float) * (W - known));
        }
}

/* The same for all channels of a head, however groups of channels and planes of bytes lie to each other. */
static void sums_of_any(const float *weights, int64_t weights_line, const uint8_t *codes, const float *scale,
                        const float *zero, int64_t groups, float *out, int64_t tokens, int64_t part, int64_t lines,
                        int bits) {
    const int64_t width = part * (8 / bits), group = width / groups;
    float values[MOST_WIDTH];
    memset(out, 0, sizeof(float) * lines * width);
    for (int64_t token = 0; token < tokens; token++) {
        for (int plane = 0; plane < 8 / bits; plane++)
            for (int64_t byte = 0; byte < part; byte++)
                values[plane * part + byte] = (float)code_of(codes[token * part + byte], plane, bits);
        for (int64_t some = 0; some < groups; some++) {
            const float by = scale[token * groups + some], start = zero[token * groups + some];
            for (int64_t i = some * group; i < (some + 1) * group; i++) values[i] = values[i] * by + start;
        }
        for (int64_t line = 0; line < lines; line++) {
            const float weight = weights[line * weights_line + token];
            for (int64_t i = 0; i < width; i++) out[line * width + i] += weight * values[i];
        }
    }
}

/* weights (heads, lines, tokens); codes (heads, tokens, part); scale and zero (heads, tokens, groups);
 * out (heads, lines, width), written to. */
int packed_sums(const float *weights, int64_t weights_head, int64_t weights_line, const uint8_t *codes,
                int64_t codes_head, const float *scale, int64_t scale_head, const float *zero, int64_t zero_head,
                float *out, int64_t heads, int64_t all_lines, int64_t tokens, int64_t groups, int64_t part, int bits,
                int threads) {
    const int64_t width = part * (8 / bits), group = width / groups, runs = (part + W - 1) / W;
    const int planes = bits == 8 ? 1 : 2, passes = 8 / bits / planes;
    if (width > MOST_WIDTH) return 1;
    int even = part >= W; /* whether all channels of each run are of one group */
    for (int64_t run = 0; even && run < runs; run++)
        for (int plane = 0; plane < 8 / bits; plane++) {
            const int64_t channel = plane * part + (run + 1 < runs ? run * W : part - W);
            even &= channel / group == (channel + W - 1) / group;
        }
    const int64_t steps = even ? passes * runs : 1;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1 && heads * tokens * width > WORTH)
    for (int64_t head = 0; head < heads; head++)
        for (int64_t step = 0; step < steps; step++) {
            const float *by = scale + head * scale_head, *start = zero + head * zero_head;
            const float *own = weights + head * weights_head;
            const uint8_t *from = codes + head * codes_head;
            float *to = out + head * all_lines * width;
            if (!even) {
                sums_of_any(own, weights_line, from, by, start, groups, to, tokens, part, all_lines, bits);
                continue;
            }
            const int64_t run = step % runs, first = run + 1 < runs ? run * W : part - W;
            const int plane = (int)(step / runs) * planes, known = (int)(run * W - first);
            const int64_t of_group[2] = {(plane * part + first) / group, ((plane + planes - 1) * part + first) / group};
            for (int64_t line = 0; line < all_lines;) {
                const int64_t lines = all_lines - line;
                line += BY_BITS(sums_of, own + line * weights_line, weights_line, from + first, by, start, groups,
                                of_group, to + line * width + first, width, tokens, part, known, plane);
            }
        }
    return 0;
}
