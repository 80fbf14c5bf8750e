"""KDA forward on a GPU in six launches: rows, products and solve (all chunks at once), map, combine, scan.

rows     of a chunk what no state enters (kda.reference has the formulas): the decayed q and k.
products A_qk and L = diag(b) A_kk. Apart from rows, because together they need twice the registers.
solve    M = (I + L)^-1 diag(b) = T diag(b).
map      for every segment but a sequence's last: the state that it makes of zero, and the matrix by which it
         multiplies its first state. A segment is an affine map of the state, so all can run at the same time.
combine  compose the maps: each segment's true first state.
scan     run every segment from its first state and write the output.

With V' = M (v - K S):    o = Q S + A_qk V'    S' = diag(exp G_C) S + Kt^T V'
where Q = scale q exp(G), K = k exp(G), Kt = k exp(G_C - G) of normalised q and k, G the log-decay summed in the chunk.

bfloat16 inputs: products of bfloat16 (of float16 where all entries lie within 1) summed in float32, the log-decay
rounded to float16. float32 inputs: float32 throughout. States are float32.
"""

import triton
import triton.language as tl

from models.kda.kernels.parts import exp2, gate_slice, inverse_norm, level_mask, sum_matrix, write_strength


@triton.jit
def meet(
    A, L, q, k, g, matrix, rows, N: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add to the transposed A and L the products of half-blocks of 2^N tokens; no exponent is positive."""
    E = exp2(tl.dot(matrix, g, input_precision=PRECISION), FAST)
    mask = level_mask(rows[None, :], rows[:, None], 2**N)
    columns = (k * E).to(OP)
    A += tl.where(mask, tl.dot(columns, tl.trans((q * E).to(OP)), input_precision=PRECISION), 0.0)
    L += tl.where(mask, tl.dot(columns, tl.trans((k * E).to(OP)), input_precision=PRECISION), 0.0)
    return A, L


@triton.jit
def panel(
    A, L, k, g, matrix, q_ptr, k_ptr, q_stride, k_stride, start, length, cols,
    J: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add to A and L [C, 16] the products of every token's k with q and with k of tokens J .. J + 15.

    Both sides are taken relative to just before J. Only for a bounded gate: over 16 tokens it sums to at most 80
    nats, and exp(80) fits. Rows after J + 15 come out wrong: the caller masks them. q and k of J .. J + 15 come
    without their norms: the caller multiplies them in.
    """
    columns = (k * exp2(tl.dot(matrix, g, input_precision=PRECISION), FAST)).to(OP)
    own = J + tl.arange(0, 16)
    s = tl.arange(0, g.shape[0])[None, :]
    down = exp2(tl.dot(((s >= J) & (s <= own[:, None])).to(g.dtype), g, input_precision=PRECISION), FAST)
    mask = (own < length)[:, None] & (cols >= 0)[None, :]
    q_own = tl.load(q_ptr + (start + own)[:, None] * q_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    k_own = tl.load(k_ptr + (start + own)[:, None] * k_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    A = tl.dot(columns, tl.trans((q_own * down).to(OP)), A, input_precision=PRECISION)
    L = tl.dot(columns, tl.trans((k_own * down).to(OP)), L, input_precision=PRECISION)
    return A, L


@triton.jit
def write_panel(A_ptr, L_ptr, A, L, q_inv_ptr, k_inv_ptr, beta_ptr, beta_stride, length, rows,
    J: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Store rows J .. J + 15 of A_qk and of L = diag(b) A_kk, given transposed [C, 16], the rows' norms still out."""
    own = J + tl.arange(0, 16)
    to = own[None, :] * C + rows[:, None]
    b = write_strength(beta_ptr + own * beta_stride, own < length, FAST)
    A *= tl.load(q_inv_ptr + own)[None, :]
    L *= (b * tl.load(k_inv_ptr + own))[None, :]
    tl.store(A_ptr + to, tl.where(rows[:, None] <= own[None, :], A, 0.0).to(A_ptr.dtype.element_ty))
    tl.store(L_ptr + to, tl.where(rows[:, None] < own[None, :], L, 0.0).to(L_ptr.dtype.element_ty))


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, g_ptr, A_log_ptr, dt_bias_ptr, chunks_ptr, sums_ptr, qd_ptr, kd_ptr, kt_ptr, norms_ptr, decay_ptr,
    q_stride, k_stride, g_stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    LOWER: tl.constexpr, EPS: tl.constexpr, OP: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: Q, K, Kt [C, K] in the inputs' dtype, and in float32 scale / |q| and 1 / |k| [2, C] and
    exp(G_C) [K].

    q, g: [tokens, H, K], k: [tokens, H / GROUP, K], strides of a token. Out: [chunks, H, ...]. One program a (head,
    chunk).
    """
    h = tl.program_id(0)
    c = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * c).to(tl.int64)
    rows = tl.arange(0, C)
    valid = rows < tl.load(chunks_ptr + 2 * c + 1)
    tokens = start + rows
    q_ptr += h * K
    k_ptr += (h // GROUP) * K
    g_ptr += h * K
    rate = tl.exp(tl.minimum(tl.load(A_log_ptr + h), 30.0))
    until = sum_matrix(sums_ptr, 0, C)
    behind = sum_matrix(sums_ptr, 1, C)
    q_inv = inverse_norm(q_ptr, q_stride, tokens, valid, K, EPS) * scale
    k_inv = inverse_norm(k_ptr, k_stride, tokens, valid, K, EPS)
    at = c * H + h
    tl.store(norms_ptr + at * 2 * C + rows, q_inv)
    tl.store(norms_ptr + at * 2 * C + C + rows, k_inv)
    for first in range(0, K, BK):
        cols = first + tl.arange(0, BK)
        mask = valid[:, None] & (cols < K)[None, :]
        bias = tl.load(dt_bias_ptr + h * K + cols)
        g = gate_slice(g_ptr, tokens[:, None] * g_stride + cols[None, :], mask, bias, rate, LOWER, SUM, FAST)
        q = tl.load(q_ptr + tokens[:, None] * q_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + tokens[:, None] * k_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        k *= k_inv[:, None]
        out = at * C * K + rows[:, None] * K + cols[None, :]
        whole = exp2(tl.dot(until, g, input_precision=PRECISION), FAST)
        tl.store(qd_ptr + out, (q * q_inv[:, None] * whole).to(OP))
        tl.store(kd_ptr + out, (k * whole).to(OP))
        last = (rows == C - 1)[:, None] & (cols < K)[None, :]
        tl.store(decay_ptr + at * K + 0 * rows[:, None] + cols[None, :], whole, mask=last)
        tail = exp2(tl.dot(behind, g, input_precision=PRECISION), FAST)
        tl.store(kt_ptr + out, (k * tail).to(OP))


@triton.jit
def products_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, dt_bias_ptr, chunks_ptr, sums_ptr, norms_ptr, A_ptr, L_ptr,
    q_stride, k_stride, g_stride, beta_stride,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    LOWER: tl.constexpr, OP: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: A_qk [C, C] in the inputs' dtype, L = diag(b) A_kk [C, C] in float16 (float32 for float32
    inputs); [chunks, H, C, C]. One program a (head, chunk).

    Products are made transposed, [column j, row i], because the columns' factors are then shared by A_qk and A_kk.
    """
    h = tl.program_id(0)
    c = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * c).to(tl.int64)
    length = tl.load(chunks_ptr + 2 * c + 1)
    rows = tl.arange(0, C)
    valid = rows < length
    tokens = start + rows
    j = rows[:, None]
    i = rows[None, :]
    q_ptr += h * K
    k_ptr += (h // GROUP) * K
    g_ptr += h * K
    beta_ptr += start * beta_stride + h
    rate = tl.exp(tl.minimum(tl.load(A_log_ptr + h), 30.0))
    norms_ptr += (c * H + h) * 2 * C
    k_inv = tl.load(norms_ptr + C + rows)
    # The softplus gate's matrices lie behind the bounded gate's.
    N: tl.constexpr = 2 if LOWER != 0 else 6
    sum0 = sum_matrix(sums_ptr, N, C)
    sum1 = sum_matrix(sums_ptr, N + 1, C)
    sum2 = sum_matrix(sums_ptr, N + 2, C)
    sum3 = sum_matrix(sums_ptr, N + 3, C)
    if LOWER == 0:
        sum4 = sum_matrix(sums_ptr, 10, C)
        sum5 = sum_matrix(sums_ptr, 11, C)
    A = tl.zeros([C, C], tl.float32)
    L = tl.zeros([C, C], tl.float32)
    A0 = tl.zeros([C, 16], tl.float32)
    A1 = tl.zeros([C, 16], tl.float32)
    A2 = tl.zeros([C, 16], tl.float32)
    A3 = tl.zeros([C, 16], tl.float32)
    L0 = tl.zeros([C, 16], tl.float32)
    L1 = tl.zeros([C, 16], tl.float32)
    L2 = tl.zeros([C, 16], tl.float32)
    L3 = tl.zeros([C, 16], tl.float32)
    for first in range(0, K, BK):
        cols = first + tl.arange(0, BK)
        mask = valid[:, None] & (cols < K)[None, :]
        bias = tl.load(dt_bias_ptr + h * K + cols)
        g = gate_slice(g_ptr, tokens[:, None] * g_stride + cols[None, :], mask, bias, rate, LOWER, SUM, FAST)
        k = tl.load(k_ptr + tokens[:, None] * k_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        k *= k_inv[:, None]
        if LOWER != 0:
            A0, L0 = panel(
                A0, L0, k, g, sum0, q_ptr, k_ptr, q_stride, k_stride, start, length, cols, 0, OP, PRECISION, FAST
            )
            A1, L1 = panel(
                A1, L1, k, g, sum1, q_ptr, k_ptr, q_stride, k_stride, start, length, cols, 16, OP, PRECISION, FAST
            )
            A2, L2 = panel(
                A2, L2, k, g, sum2, q_ptr, k_ptr, q_stride, k_stride, start, length, cols, 32, OP, PRECISION, FAST
            )
            A3, L3 = panel(
                A3, L3, k, g, sum3, q_ptr, k_ptr, q_stride, k_stride, start, length, cols, 48, OP, PRECISION, FAST
            )
        else:
            q = tl.load(q_ptr + tokens[:, None] * q_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            q *= tl.load(norms_ptr + rows)[:, None]
            A, L = meet(A, L, q, k, g, sum0, rows, 0, OP, PRECISION, FAST)
            A, L = meet(A, L, q, k, g, sum1, rows, 1, OP, PRECISION, FAST)
            A, L = meet(A, L, q, k, g, sum2, rows, 2, OP, PRECISION, FAST)
            A, L = meet(A, L, q, k, g, sum3, rows, 3, OP, PRECISION, FAST)
            A, L = meet(A, L, q, k, g, sum4, rows, 4, OP, PRECISION, FAST)
            A, L = meet(A, L, q, k, g, sum5, rows, 5, OP, PRECISION, FAST)
            A += tl.where(i == j, tl.sum(q * k, 1)[:, None], 0.0)
    A_ptr += (c * H + h) * C * C
    L_ptr += (c * H + h) * C * C
    if LOWER != 0:
        q_inv_ptr, k_inv_ptr = norms_ptr, norms_ptr + C
        write_panel(A_ptr, L_ptr, A0, L0, q_inv_ptr, k_inv_ptr, beta_ptr, beta_stride, length, rows, 0, C, FAST)
        write_panel(A_ptr, L_ptr, A1, L1, q_inv_ptr, k_inv_ptr, beta_ptr, beta_stride, length, rows, 16, C, FAST)
        write_panel(A_ptr, L_ptr, A2, L2, q_inv_ptr, k_inv_ptr, beta_ptr, beta_stride, length, rows, 32, C, FAST)
        write_panel(A_ptr, L_ptr, A3, L3, q_inv_ptr, k_inv_ptr, beta_ptr, beta_stride, length, rows, 48, C, FAST)
    else:
        b = write_strength(beta_ptr + rows * beta_stride, valid, FAST)
        tl.store(A_ptr + i * C + j, A.to(A_ptr.dtype.element_ty))
        tl.store(L_ptr + i * C + j, (L * b[None, :]).to(L_ptr.dtype.element_ty))


@triton.jit
def solve_kernel(
    L_ptr, beta_ptr, chunks_ptr, M_ptr, T_ptr, b_ptr, beta_stride,
    H: tl.constexpr, C: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """T = (I + L)^-1 and M = T diag(b) [C, C] of a chunk, in the inputs' dtype; one program a (head, chunk).

    KEEP stores T too, and b [chunks, H, C] in float32: the backward reads them. By blocks of 2, 4, ... C:
    T <- T - T L_block T. Every intermediate is the inverse of a diagonal block, whose entries lie within 1 for KDA (a
    block of the delta rule maps unit values to errors no larger), so nothing is cancelled, unlike in a power series.
    """
    h = tl.program_id(0)
    c = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * c).to(tl.int64)
    length = tl.load(chunks_ptr + 2 * c + 1)
    D: tl.constexpr = C // 2
    at = (c * H + h) * C * C
    beta_ptr += start * beta_stride + h
    # Both halves of the diagonal together, then the block below it.
    half = tl.arange(0, 2)[:, None, None] * D
    i = tl.arange(0, D)[None, :, None]
    j = tl.arange(0, D)[None, None, :]
    both = at + (half + i) * C + half + j
    L = tl.load(L_ptr + both)
    X = tl.where(i == j, 1.0, 0.0) - tl.where(level_mask(i, j, 1), L, 0.0).to(tl.float32)
    for n in tl.static_range(1, 5):
        if 2**n < D:
            block = tl.where(level_mask(i, j, 2**n), L, 0.0).to(L.dtype)
            Y = tl.dot(block, X.to(L.dtype), input_precision=PRECISION)
            X -= tl.dot(X.to(L.dtype), Y.to(L.dtype), input_precision=PRECISION)
    first, second = tl.split(tl.permute(X, (1, 2, 0)))
    r = tl.arange(0, D)[:, None]
    s = tl.arange(0, D)[None, :]
    below = at + (D + r) * C + s
    Y = tl.dot(tl.load(L_ptr + below), first.to(L.dtype), input_precision=PRECISION)
    low = -tl.dot(second.to(L.dtype), Y.to(L.dtype), input_precision=PRECISION)
    b = write_strength(beta_ptr + (half + j) * beta_stride, half + j < length, FAST)
    tl.store(M_ptr + both, (X * b).to(OP))
    tl.store(M_ptr + below, (low * write_strength(beta_ptr + s * beta_stride, s < length, FAST)).to(OP))
    zero = tl.zeros([D, D], OP)
    above = at + r * C + D + s
    tl.store(M_ptr + above, zero)
    if KEEP:
        tl.store(T_ptr + both, X.to(OP))
        tl.store(T_ptr + below, low.to(OP))
        tl.store(T_ptr + above, zero)
        rows = tl.arange(0, C)
        tl.store(b_ptr + (c * H + h) * C + rows, write_strength(beta_ptr + rows * beta_stride, rows < length, FAST))


@triton.jit
def scan_kernel(
    qd_ptr, kd_ptr, kt_ptr, A_ptr, M_ptr, decay_ptr, v_ptr, o_ptr, first_ptr, last_ptr, new_ptr, states_ptr,
    segments_ptr, jobs_ptr, v_stride,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, MAP: tl.constexpr, SEGMENTED: tl.constexpr, HAS_FIRST: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Run a segment chunk by chunk, BV columns of the state at a time; the state [K, BV] stays in registers.

    MAP: one program a (column block, head, job); last_ptr gets the map [segments, H, 2, K, max(K, V)], float32.
    Else: one program a (column block, head, segment), from first_ptr ([segments, H, K, V] if SEGMENTED, else
    [sequences, H, K, V], else zero), and last_ptr gets each sequence's last state [sequences, H, K, V].
    OUTPUT writes o [tokens, H, V]. KEEP writes what the backward reads: V' and each chunk's first state, [chunks, H,
    C or K, V] in the inputs' dtype.
    """
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    job = tl.program_id(2)
    part = job * 0
    segment = job
    if MAP:
        segment = tl.load(jobs_ptr + 2 * job)
        part = tl.load(jobs_ptr + 2 * job + 1)
    sequence = tl.load(segments_ptr + 7 * segment)
    begin = tl.load(segments_ptr + 7 * segment + 1)
    count = tl.load(segments_ptr + 7 * segment + 2)
    begins = tl.load(segments_ptr + 7 * segment + 3)
    ends = tl.load(segments_ptr + 7 * segment + 4)
    start = tl.load(segments_ptr + 7 * segment + 5).to(tl.int64)
    end = tl.load(segments_ptr + 7 * segment + 6)
    rows = tl.arange(0, C)
    keys = tl.arange(0, K)
    inside = (keys[:, None] < K) & (cols < V)[None, :]
    here = keys[:, None] * V + cols[None, :]
    S = tl.zeros([K, BV], tl.float32)
    if HAS_FIRST:
        if MAP:
            # Only the segment that begins its sequence knows its first state: the others start from zero.
            known = (keys[:, None] < K) & (cols < V * begins * (1 - part))[None, :]
            S = tl.load(first_ptr + (sequence * H + h).to(tl.int64) * K * V + here, mask=known, other=0.0)
        else:
            index = segment if SEGMENTED else sequence
            S = tl.load(first_ptr + (index * H + h).to(tl.int64) * K * V + here, mask=inside, other=0.0)
    if MAP:
        S += tl.where(keys[:, None] == cols[None, :], part.to(tl.float32), 0.0)
    v_ptr += (h // GROUP) * V
    for n in tl.range(0, count, num_stages=STAGES):
        c = (begin + n).to(tl.int64)
        at = c * H + h
        tokens = start + n * C + rows
        seen = (tokens < end)[:, None] & (cols < V)[None, :]
        given = (tokens < end)[:, None] & (cols < V * (1 - part))[None, :]  # a map's matrix is made without values
        kd = tl.load(kd_ptr + at * C * K + rows[:, None] * K + keys[None, :])
        kt = tl.load(kt_ptr + at * C * K + rows[:, None] * K + keys[None, :])
        M = tl.load(M_ptr + at * C * C + rows[:, None] * C + rows[None, :])
        decay = tl.load(decay_ptr + at * K + keys)
        v = tl.load(v_ptr + tokens[:, None] * v_stride + cols[None, :], mask=given, other=0.0)
        S_op = S.to(OP)
        if KEEP:
            tl.store(states_ptr + at * K * V + here, S_op, mask=inside)
        X = v.to(tl.float32) - tl.dot(kd, S_op, input_precision=PRECISION)
        new = tl.dot(M, X.to(OP), input_precision=PRECISION).to(OP)
        if KEEP:
            to = new_ptr + at * C * V + rows[:, None] * V + cols[None, :]
            tl.store(to, new, mask=(rows[:, None] < C) & (cols < V)[None, :])
        if OUTPUT:
            qd = tl.load(qd_ptr + at * C * K + rows[:, None] * K + keys[None, :])
            A = tl.load(A_ptr + at * C * C + rows[:, None] * C + rows[None, :])
            o = tl.dot(qd, S_op, input_precision=PRECISION)
            o = tl.dot(A, new, o, input_precision=PRECISION)
            to = (tokens[:, None] * H + h) * V + cols[None, :]
            tl.store(o_ptr + to, o.to(o_ptr.dtype.element_ty), mask=seen)
        S = tl.dot(tl.trans(kt), new, S * decay[:, None], input_precision=PRECISION)
    if MAP:
        D: tl.constexpr = max(K, V)
        to = ((segment * H + h) * 2 + part).to(tl.int64) * K * D + keys[:, None] * D + cols[None, :]
        tl.store(last_ptr + to, S, mask=(keys[:, None] < K) & (cols < D)[None, :])
    elif ends:
        tl.store(last_ptr + (sequence * H + h).to(tl.int64) * K * V + here, S, mask=inside)


@triton.jit
def combine_kernel(
    maps_ptr, first_ptr, states_ptr, spans_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_FIRST: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each segment's first state [segments, H, K, V] from the maps; one program a (column block, head, sequence).

    REVERSE: segments from a sequence's last to its first, as the backward scans them.
    """
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    sequence = tl.program_id(2)
    segment = tl.load(spans_ptr + 2 * sequence)
    count = tl.load(spans_ptr + 2 * sequence + 1)
    step = 1
    if REVERSE:
        segment += count - 1
        step = -1
    keys = tl.arange(0, K)
    inside = (keys[:, None] < K) & (cols < V)[None, :]
    D: tl.constexpr = max(K, V)
    here = keys[:, None] * V + cols[None, :]
    S = tl.zeros([K, BV], tl.float32)
    if HAS_FIRST:
        S = tl.load(first_ptr + (sequence * H + h).to(tl.int64) * K * V + here, mask=inside, other=0.0)
    tl.store(states_ptr + (segment * H + h).to(tl.int64) * K * V + here, S, mask=inside)
    for n in range(0, count - 1):
        whole = maps_ptr + (segment * H + h).to(tl.int64) * 2 * K * D
        made = tl.load(whole + keys[:, None] * D + cols[None, :], mask=inside, other=0.0)
        if n == 0:
            S = made
        else:
            M = tl.load(whole + K * D + keys[:, None] * D + keys[None, :])
            S = tl.dot(M, S, made, input_precision=PRECISION)
        segment += step
        tl.store(states_ptr + (segment * H + h).to(tl.int64) * K * V + here, S, mask=inside)
