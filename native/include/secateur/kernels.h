/* C interface of the sparse CPU kernels: pack a weight once, multiply by it many times.
 *
 * Raw pointers and plain integers only, no dependency on any framework. Every function is re-entrant; a
 * packed weight ("blob") is one flat little-endian buffer that holds offsets instead of pointers, so it can
 * be saved and memory-mapped back as it is. Functions return SCT_OK or an error code that sct_error_text
 * explains.
 */
#ifndef SECATEUR_KERNELS_H_
#define SECATEUR_KERNELS_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum sct_status {
  SCT_OK = 0,
  SCT_BAD_ARGUMENT = 1,    /* a null pointer, a negative size or an impossible parameter */
  SCT_BAD_BLOB = 2,        /* not a packed weight, or a damaged one */
  SCT_NO_MEMORY = 3,       /* memory could not be had */
  SCT_UNSUPPORTED_ISA = 4, /* this CPU or this build lacks the instruction set that was asked for */
  SCT_MISALIGNED = 5,      /* a packed weight must start at a multiple of 8 bytes */
  SCT_OTHER_LAYOUT = 6     /* a packed weight in a layout that this version does not read */
};

enum sct_isa {
  SCT_ISA_AUTO = 0,
  SCT_ISA_PORTABLE = 1,
  SCT_ISA_NEON = 2,
  SCT_ISA_AVX2 = 3,
  SCT_ISA_AVX512 = 4
};

enum sct_format { SCT_TILED = 1, SCT_BLOCK = 2, SCT_BITMASK = 3, SCT_QUAD = 4, SCT_NM = 5 };

/* SCT_I8 is symmetric with one float32 scale a row. */
enum sct_value { SCT_F32 = 0, SCT_BF16 = 1, SCT_F16 = 2, SCT_I8 = 3 };

enum sct_norm { SCT_NO_NORM = 0, SCT_LAYER_NORM = 1, SCT_RMS_NORM = 2 };

enum sct_activation { SCT_NONE = 0, SCT_RELU = 1, SCT_GELU = 2, SCT_GELU_TANH = 3, SCT_SILU = 4 };

/* What a blob says about itself; p is {tile, chunk, row_block, layout} for the tiled format, {tile, chunk, row_block, 0}
 * for the quad format, {block, chunk, row_block, 0} for the block format, {keep, of, 0, 0} for nm, zeros for the bitmask
 * format. */
typedef struct {
  int64_t rows, cols, nonzeros, bytes;
  int32_t format, value;
  int32_t p[4];
} sct_info;

const char* sct_error_text(int status);

/* The instruction set that `requested` (or, for SCT_ISA_AUTO, the SECATEUR_ISA variable, or else the CPU)
 * leads to; negative when it is not available. */
int sct_resolve_isa(int requested);
const char* sct_isa_name(int isa);

/* Gives a packer `bytes` bytes (64-byte aligned by preference, 8 at least), or NULL. */
typedef void* (*sct_allocate)(void* context, int64_t bytes);

/* Packers. `weight` is (rows, cols) float32 with `ld` floats from row to row. The blob is written to memory
 * that allocate(context, size) returns; it is called at most once. */
int sct_pack_tiled(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t tile,
                   int32_t chunk, int32_t row_block, sct_allocate allocate, void* context);

/* Blocks of `block` (4 or 8) rows of one column, kept or gone together, for any number of tokens; any value
 * type. A block with any nonzero is stored whole. chunk is at most 65536. SCT_BAD_ARGUMENT when a weight has
 * no finite value in the type: int8 takes no NaN or infinity, float16 nothing finite beyond 65504. */
int sct_pack_block(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t block,
                   int32_t chunk, int32_t row_block, sct_allocate allocate, void* context);

/* Any pattern of zeros for few tokens: a bit a weight, then the nonzeros; float32, bf16 or int8. */
int sct_pack_bitmask(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value,
                     sct_allocate allocate, void* context);

/* N:M: at most `keep` of every `of` columns of a row; 1 or 2 of 4, or 4 of 8. For few tokens; any value type.
 * SCT_BAD_ARGUMENT where a group has more nonzeros. */
int sct_pack_nm(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t keep, int32_t of,
                sct_allocate allocate, void* context);

/* Quads (four columns of a row from a multiple of four on) kept or gone together, for many tokens, int8 with a scale a
 * row. Activations are rounded to uint8 with a scale a token at each call (about 1% of the output); tokens with NaN or
 * infinity are computed in float32. At most 65536 columns; tile as for tiled, chunk a multiple of 4. */
int sct_pack_quad(const float* weight, int64_t rows, int64_t cols, int64_t ld, int32_t tile, int32_t chunk,
                  int32_t row_block, sct_allocate allocate, void* context);

/* Read the header (cheap), or walk every index of a blob of unknown origin (as long as the blob). */
int sct_describe(const uint8_t* blob, int64_t bytes, sct_info* info);
int sct_validate(const uint8_t* blob, int64_t bytes);

/* The dense float32 weight (rows, cols), contiguous, from a blob. */
int sct_unpack(const uint8_t* blob, int64_t bytes, float* weight);

/* y[t, o] = activation(sum_k x[t, k] * w[o, k] + bias[o]) for `tokens` rows of x (ldx floats apart) and of y
 * (ldy floats apart). bias may be NULL. Runs on at most `threads` threads, the caller's among them. NaN and
 * infinity in x reach y exactly as in a dense product: a zero weight times infinity is NaN. */
int sct_linear(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx,
               const float* bias, int activation, float* y, int64_t ldy, int threads, int isa);

/* What is done to the outputs of a token while they are in cache: norm(y * gate + residual). residual and gate (tokens,
 * rows) with ld and gate_ld floats from row to row, scale and shift (rows) may be NULL. */
typedef struct {
  const float* residual;
  int64_t ld;
  int norm;
  const float *scale, *shift;
  float epsilon;
  const float* gate;
  int64_t gate_ld;
} sct_after;

/* Threads of the caller's: calls task(context) at most `threads` times, on any number of threads and once at least, and
 * returns when all calls have. */
typedef void (*sct_run_function)(void* pool, void (*task)(void*), void* context, int threads);

/* sct_linear with something after it and on threads of the caller's, each of which may be NULL. */
int sct_linear_on(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx, const float* bias,
                  int activation, const sct_after* after, float* y, int64_t ldy, int threads, int isa,
                  sct_run_function run, void* pool);

/* y = norm(x) over the `width` numbers of each of `tokens` tokens, ldx and ldy floats apart; y may be x. scale and shift
 * (width) may be NULL. */
int sct_norm_on(const float* x, int64_t tokens, int64_t width, int64_t ldx, int norm, const float* scale,
                const float* shift, float epsilon, float* y, int64_t ldy, int threads, int isa, sct_run_function run,
                void* pool);

/* out = softmax(scale q k^T + mask) v, head by head; `heads` queries share kv_heads keys and values. Strides are floats
 * (bytes for keep) from batch to batch, head to head and token to token; the `width` numbers of a head, and the keys of
 * a mask, are contiguous. mask is added, a key whose keep is 0 is left out; both may be NULL, and their strides 0. A
 * query without keys gives zeros. */
typedef struct {
  const float *q, *k, *v;
  float* out;
  int64_t batch, heads, kv_heads, queries, keys, width;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  const float* mask;
  int64_t mask_stride[3];
  const uint8_t* keep;
  int64_t keep_stride[3];
  float scale;
} sct_attention_job;
int sct_attention(const sct_attention_job* job, int threads, int isa, sct_run_function run, void* pool);

/* Rotary positions: y = x cos + turned(x) sin, where turned(x) is the second half of a head's `width` numbers, negated,
 * before the first. Strides are floats from batch to batch, head to head and token to token; cos and sin hold `width`
 * numbers a token, turn_stride floats from batch to batch (0: all are alike). y may be x. */
int sct_rotary(const float* x, const int64_t x_stride[3], int64_t batch, int64_t heads, int64_t tokens, int64_t width,
               const float* cos, const float* sin, int64_t turn_stride, float* y, const int64_t y_stride[3]);

/* A chain of layers over `batch` sequences of `tokens` tokens each, computed without leaving the tiled layout. Value 0 is
 * x; step i writes value i + 1, of rows numbers a token; the last step writes y. `from` are the values that a step
 * reads, -1 where there is none:
 *
 *   SCT_LINEAR_STEP     activation(w from[0] + bias)
 *   SCT_NORM_STEP       norm(from[0] + from[1])
 *   SCT_ATTENTION_STEP  softmax(factor q k^T + mask) v with q, k and v in the rows of from[0 .. 2] from `first` on
 *
 * Weights are of the tiled format, all with one tile. */
enum sct_step_kind {
  SCT_LINEAR_STEP = 0,
  SCT_NORM_STEP = 1,
  SCT_ATTENTION_STEP = 2,
  SCT_ROTARY_STEP = 3, /* of sct_token alone, as the next */
  SCT_GATE_STEP = 4
};
typedef struct {
  int kind;
  int64_t from[3], first[3];
  const uint8_t* blob;
  int64_t bytes;
  const float* bias;
  int activation, norm;
  const float *scale, *shift;
  float epsilon;
  int64_t heads, kv_heads, width;
  float factor;
} sct_step;

/* x (batch, tokens, width) and y are contiguous; mask and keep as for attention. */
typedef struct {
  const float* x;
  float* y;
  int64_t batch, tokens, width;
  const sct_step* steps;
  int64_t count;
  const float* mask;
  int64_t mask_stride[3];
  const uint8_t* keep;
  int64_t keep_stride[3];
} sct_chain_job;

/* Numbers a token in y; negative where steps do not fit together. */
int64_t sct_chain_rows(const sct_step* steps, int64_t count, int64_t width);
int sct_chain(const sct_chain_job* job, int threads, int isa, sct_run_function run, void* pool);

/* One token of each of `batch` sequences through steps of a decoder's block. Value 0 is x (batch, width), step i writes
 * value i + 1 (batch, rows); `values` holds them one after the other. Weights are of any format. Steps differ from those
 * of a chain in that
 *
 *   SCT_LINEAR_STEP     multiplies by from[1] and adds from[2], where there are such; without a blob it stands for a
 *                       layer of `bytes` rows that the caller computes
 *   SCT_NORM_STEP       goes head by head where `heads` is not 0
 *   SCT_ROTARY_STEP     turns the heads in from[0] by cos and sin, as sct_rotary
 *   SCT_GATE_STEP       from[0] times from[1]
 *   SCT_ATTENTION_STEP  has its queries in from[0], and keys and values in k and v, with strides and masks as for
 *                       sct_attention (keep has the strides of mask)
 */
typedef struct {
  const sct_step* steps;
  int64_t count, width, batch;
  const float* x;
  float* values;
  const float *cos, *sin;
  int64_t turn_stride;
  const float *k, *v;
  int64_t keys, k_stride[3], v_stride[3];
  const float* mask;
  const uint8_t* keep;
  int64_t mask_stride[3];
} sct_token_job;

/* Numbers a token in all values but x; negative where steps do not fit together. */
int64_t sct_token_floats(const sct_step* steps, int64_t count, int64_t width);
/* Steps [begin, end), for which all values before have been written. */
int sct_token(const sct_token_job* job, int64_t begin, int64_t end, int threads, int isa, sct_run_function run,
              void* pool);

/* Inner loops of one-shot pruning, row by row on at most `threads` threads, in place. `wide` chooses float
 * (0) or double (1) for every void pointer. Matrices are contiguous but where a leading dimension is given.
 *
 * Sweep: one band of SparseGPT. w (rows, width) with ldw from row to row; upper (width, width) with ldu, the
 * band's part of the Cholesky factor; inverse (width), 1 / its diagonal, 0 for dead inputs; mask (rows,
 * width), 1 where a weight stays, chosen here in groups of `of` when of > 0; errors (rows, width), written.
 */
int sct_repair_sweep(void* w, int64_t ldw, int64_t rows, int64_t width, const void* upper, int64_t ldu,
                     const void* inverse, uint8_t* mask, int keep, int of, void* errors, int wide,
                     int threads, int isa);

/* Swap: one pass of exact 1-swaps. c (n, n), unit diagonal; largest (n), the largest |c| of each row off the
 * diagonal; v, r, open (rows, n); kept (rows, n). *swaps is their number. */
int sct_repair_swap(const void* c, const void* largest, int64_t rows, int64_t n, double slack, void* v,
                    void* r, void* open, uint8_t* kept, int64_t* swaps, int wide, int threads, int isa);

/* Group: the same for N:M with at most 16 weights a group, over all patterns (count, keep) of it. inverses
 * (n / of, count, keep, keep). */
int sct_repair_group(const void* c, int64_t rows, int64_t n, double slack, void* v, void* r, uint8_t* mask,
                     int keep, int of, const uint8_t* patterns, int count, const void* inverses,
                     int64_t* changed, int wide, int threads, int isa);

/* Let the kernels run on an OpenMP runtime that the process uses already (its GOMP_parallel), so that two
 * pools do not fight for the cores; NULL goes back to the own pool. */
typedef void (*sct_fork_function)(void (*task)(void*), void* context, unsigned threads, unsigned flags);
void sct_use_openmp(sct_fork_function gomp_parallel);

#ifdef __cplusplus
}
#endif
#endif
