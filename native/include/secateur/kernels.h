/* C interface of the sparse CPU kernels: pack a weight once, multiply by it many times.
 *
 * Raw pointers and plain integers only, no dependency on any framework. Every function is re-entrant. A packed weight
 * ("blob") is one flat little-endian buffer that holds offsets instead of pointers, so it can be saved and
 * memory-mapped as it is. Functions return SCT_OK or an error code that sct_error_text explains.
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
  SCT_NO_MEMORY = 3,       /* memory could not be allocated */
  SCT_UNSUPPORTED_ISA = 4, /* this CPU or this build lacks the instruction set that was asked for */
  SCT_MISALIGNED = 5,      /* a packed weight must start at a multiple of 8 bytes */
  SCT_OTHER_LAYOUT = 6     /* a packed weight in a layout that this version does not read */
};

enum sct_isa { SCT_ISA_AUTO = 0, SCT_ISA_PORTABLE = 1, SCT_ISA_NEON = 2, SCT_ISA_AVX2 = 3, SCT_ISA_AVX512 = 4 };

enum sct_format { SCT_TILED = 1, SCT_BLOCK = 2, SCT_BITMASK = 3, SCT_QUAD = 4, SCT_NM = 5 };

/* SCT_I8 is symmetric with one float32 scale a row. */
enum sct_value { SCT_F32 = 0, SCT_BF16 = 1, SCT_F16 = 2, SCT_I8 = 3 };

enum sct_norm { SCT_NO_NORM = 0, SCT_LAYER_NORM = 1, SCT_RMS_NORM = 2 };

enum sct_activation { SCT_NONE = 0, SCT_RELU = 1, SCT_GELU = 2, SCT_GELU_TANH = 3, SCT_SILU = 4 };

/* The header of a blob. p is {tile, chunk, row_block, layout} for the tiled format, {tile, chunk, row_block, 0} for
 * quad, {block, chunk, row_block, 0} for block, {keep, of, 0, 0} for nm, and zeros for bitmask. */
typedef struct {
  int64_t rows, cols, nonzeros, bytes;
  int32_t format, value;
  int32_t p[4];
} sct_info;

const char* sct_error_text(int status);

/* The instruction set for `requested`; negative when it is not available. SCT_ISA_AUTO is what the environment variable
 * SECATEUR_ISA names, or else the best one of this CPU. */
int sct_resolve_isa(int requested);
const char* sct_isa_name(int isa);

/* Gives a packer `bytes` bytes (64-byte aligned by preference, 8 at least), or NULL. */
typedef void* (*sct_allocate)(void* context, int64_t bytes);

/* Packers. `weight` is (rows, cols) float32 with `ld` floats from row to row. The blob is written to memory that
 * allocate(context, size) returns; allocate is called at most once. */
int sct_pack_tiled(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t tile, int32_t chunk,
                   int32_t row_block, sct_allocate allocate, void* context);

/* Blocks of `block` (4 or 8) rows of one column that are zero or nonzero together, for any number of tokens; any value
 * type. A block with any nonzero is stored whole. chunk is at most 65536. Returns SCT_BAD_ARGUMENT when a weight has no
 * value in the type: int8 takes no NaN or infinity, float16 no finite weight beyond 65504. */
int sct_pack_block(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t block, int32_t chunk,
                   int32_t row_block, sct_allocate allocate, void* context);

/* Any pattern of zeros, for few tokens: one bit for each weight, then the nonzeros; float32, bf16 or int8. */
int sct_pack_bitmask(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, sct_allocate allocate,
                     void* context);

/* N:M: at most `keep` nonzeros in every `of` columns of a row; 1 or 2 of 4, or 4 of 8. For few tokens; any value type.
 * Returns SCT_BAD_ARGUMENT where a group has more nonzeros. */
int sct_pack_nm(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t keep, int32_t of,
                sct_allocate allocate, void* context);

/* Quads (four columns of a row from a multiple of four on) that are zero or nonzero together, for many tokens; int8
 * with a scale for each row. Each call rounds activations to uint8 with a scale for each token (an error of about 1% of
 * the output); tokens with NaN or infinity are computed in float32. At most 65536 columns; tile as for tiled, chunk a
 * multiple of 4. */
int sct_pack_quad(const float* weight, int64_t rows, int64_t cols, int64_t ld, int32_t tile, int32_t chunk,
                  int32_t row_block, sct_allocate allocate, void* context);

/* sct_describe reads the header (cheap). sct_validate also checks every index of a blob of unknown origin, and that no
 * row names a column twice, which takes time in proportion to its size. All functions that compute expect a blob that a
 * packer has written or sct_validate has passed. */
int sct_describe(const uint8_t* blob, int64_t bytes, sct_info* info);
int sct_validate(const uint8_t* blob, int64_t bytes);

/* The dense float32 weight (rows, cols), contiguous, from a blob, which is validated first. */
int sct_unpack(const uint8_t* blob, int64_t bytes, float* weight);

/* y[t, o] = activation(sum_k x[t, k] * w[o, k] + bias[o]) for `tokens` rows of x (ldx floats from row to row) and of y
 * (ldy floats from row to row). bias may be NULL. Runs on at most `threads` threads, the caller's among them. NaN and
 * infinity in x reach y exactly as in a dense product: a zero weight times infinity is NaN. */
int sct_linear(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx, const float* bias,
               int activation, float* y, int64_t ldy, int threads, int isa);

/* An operation on the outputs of a token while they are in cache: norm(y * gate + residual). residual and gate are
 * (tokens, rows) with ld and gate_ld floats from row to row, scale and shift (rows) belong to the norm; each may be
 * NULL. */
typedef struct {
  const float* residual;
  int64_t ld;
  int norm;
  const float *scale, *shift;
  float epsilon;
  const float* gate;
  int64_t gate_ld;
} sct_after;

/* The caller's threads: a function that calls task(context) at least once and at most `threads` times, on any number of
 * threads, and returns when all calls have returned. */
typedef void (*sct_run_function)(void* pool, void (*task)(void*), void* context, int threads);

/* sct_linear, followed by `after`, on the caller's threads. `after` and `run` may be NULL. */
int sct_linear_on(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx, const float* bias,
                  int activation, const sct_after* after, float* y, int64_t ldy, int threads, int isa,
                  sct_run_function run, void* pool);

/* y = norm(x) over the `width` numbers of each of `tokens` tokens, with ldx and ldy floats from token to token; y may
 * be x. scale and shift (width) may be NULL. */
int sct_norm_on(const float* x, int64_t tokens, int64_t width, int64_t ldx, int norm, const float* scale,
                const float* shift, float epsilon, float* y, int64_t ldy, int threads, int isa, sct_run_function run,
                void* pool);

/* out = softmax(scale q k^T + mask) v, head by head; `heads` heads of queries share kv_heads heads of keys and values.
 * Strides are floats (bytes for keep) from batch to batch, head to head and token to token; the `width` numbers of a
 * head, and the keys of a mask, are contiguous. mask is added, and a key whose keep is 0 is left out; both may be NULL,
 * and their strides 0. A query without keys gives zeros. */
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

/* Rotary position embedding: y = x cos + rotate_half(x) sin, where rotate_half(x) is the second half of the `width`
 * numbers of a head, negated, followed by the first half. Strides are floats from batch to batch, head to head and
 * token to token. cos and sin hold `width` numbers for each token, with turn_stride floats from batch to batch (0 where
 * all batches share them). y may be x. */
int sct_rotary(const float* x, const int64_t x_stride[3], int64_t batch, int64_t heads, int64_t tokens, int64_t width,
               const float* cos, const float* sin, int64_t turn_stride, float* y, const int64_t y_stride[3]);

/* A chain of layers over `batch` sequences of `tokens` tokens each, all of whose values stay in the packed layout of
 * tiles. Value 0 is x; step i writes value i + 1; the last step writes y. The rows of a value are its numbers a token.
 * `from` are the values that a step reads, -1 where there is none:
 *
 *   SCT_LINEAR_STEP     activation(w from[0] + bias)
 *   SCT_NORM_STEP       norm(from[0] + from[1])
 *   SCT_ATTENTION_STEP  softmax(factor q k^T + mask) v with q, k and v in the rows of from[0 .. 2] from `first` on
 *
 * All weights are of the tiled format and have the same tile. */
enum sct_step_kind {
  SCT_LINEAR_STEP = 0,
  SCT_NORM_STEP = 1,
  SCT_ATTENTION_STEP = 2,
  SCT_ROTARY_STEP = 3, /* only for sct_token */
  SCT_GATE_STEP = 4    /* only for sct_token */
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

/* x (batch, tokens, width) and y (batch, tokens, rows) are contiguous; mask and keep are as for sct_attention. */
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

/* The numbers a token in y; negative where steps do not fit together. */
int64_t sct_chain_rows(const sct_step* steps, int64_t count, int64_t width);
int sct_chain(const sct_chain_job* job, int threads, int isa, sct_run_function run, void* pool);

/* Runs one token of each of `batch` sequences through the steps of a decoder's block. Value 0 is x (batch, width); step
 * i writes value i + 1 (batch, rows); `values` holds the values from 1 on, one after another. Weights are of any
 * format. Steps differ from those of a chain:
 *
 *   SCT_LINEAR_STEP     multiplies its output by from[1] and adds from[2], where these are given; without a blob, it
 *                       stands for a layer of `bytes` rows that the caller computes
 *   SCT_NORM_STEP       norms each head separately where `heads` is not 0
 *   SCT_ROTARY_STEP     rotates the heads in from[0] by cos and sin, as sct_rotary does
 *   SCT_GATE_STEP       multiplies from[0] by from[1]
 *   SCT_ATTENTION_STEP  reads its queries from from[0], and keys and values from k and v; strides and masks are as for
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

/* The numbers a token in all values but x; negative where steps do not fit together. */
int64_t sct_token_floats(const sct_step* steps, int64_t count, int64_t width);
/* Runs steps [begin, end). The values of all steps before `begin` must have been written. */
int sct_token(const sct_token_job* job, int64_t begin, int64_t end, int threads, int isa, sct_run_function run,
              void* pool);

/* Inner loops of one-shot pruning, row by row on at most `threads` threads, in place. `wide` chooses the type of every
 * void pointer: float (0) or double (1). Matrices without a leading dimension are contiguous.
 *
 * Sweep: one band of SparseGPT.
 *
 *   w        (rows, width), with ldw numbers from row to row
 *   upper    (width, width), with ldu numbers from row to row: the band's part of the Cholesky factor
 *   inverse  (width), 1 / the diagonal of upper, 0 for dead inputs
 *   mask     (rows, width), 1 where a weight is kept; chosen by the sweep in groups of `of` when of > 0
 *   errors   (rows, width), written
 */
int sct_repair_sweep(void* w, int64_t ldw, int64_t rows, int64_t width, const void* upper, int64_t ldu,
                     const void* inverse, uint8_t* mask, int keep, int of, void* errors, int wide, int threads,
                     int isa);

/* Swap: one pass of exact 1-swaps. Writes the number of swaps to *swaps.
 *
 *   c        (n, n), with unit diagonal
 *   largest  (n), the largest |c| of each row off the diagonal
 *   v, r, open, kept  (rows, n), see src/isa/repair.inl
 */
int sct_repair_swap(const void* c, const void* largest, int64_t rows, int64_t n, double slack, void* v, void* r,
                    void* open, uint8_t* kept, int64_t* swaps, int wide, int threads, int isa);

/* Group: one pass over N:M groups of at most 16 weights, each of which takes the best of all patterns. Writes the
 * number of changed groups to *changed.
 *
 *   c         (n, n), with unit diagonal
 *   v, r, mask  (rows, n), see src/isa/repair.inl
 *   patterns  (count, keep)
 *   inverses  (n / of, count, keep, keep)
 */
int sct_repair_group(const void* c, int64_t rows, int64_t n, double slack, void* v, void* r, uint8_t* mask, int keep,
                     int of, const uint8_t* patterns, int count, const void* inverses, int64_t* changed, int wide,
                     int threads, int isa);

/* Makes the kernels run on an OpenMP runtime that the process uses already (its GOMP_parallel), so that two pools do
 * not compete for the cores. NULL goes back to the library's own pool. */
typedef void (*sct_fork_function)(void (*task)(void*), void* context, unsigned threads, unsigned flags);
void sct_use_openmp(sct_fork_function gomp_parallel);

#ifdef __cplusplus
}
#endif
#endif
