"""KDA backward on a GPU: the forward's parts again, then a scan from the end, then every chunk by itself.

reverse   the gradient R of the state, from a sequence's last chunk to its first, in segments like the forward's scan:
              dV' = A_qk^T dO + Kt R     W = T^T dV'     dV = b W
              R  <- diag(exp G_C) R + Q^T dO - K^T (b W)
products  dA_qk = lower(dO V'^T)     d(diag(b) A_kk) = -strictlower(W V'^T)     dbeta = (1 - b) sum_v W V'
states    dQ = dO S^T     dK = -(b W) S^T     dKt = V' R^T     of a chunk's first state S and the R behind it
rows and  from these to q, k (normalised) and the gate input; with r = decay from j to i, dP = diag(b) dL:
columns
              dq_i = sum_j dA_ij k_j r + exp(G_i) dQ_i       a_i = sum_j dP_ij k_j r + exp(G_i) dK_i
              c_j = sum_i (dP_ij k_i + dA_ij q_i) r + exp(G_C - G_j) dKt_j       dk = a + c
          dg by the chain rule through every exponent; the short way, the sum from the end of q dq + k a - k c, cancels
          badly where a strong decay lies between
norms     through the L2 norms, and the sum over the heads that share a k head.

That dbeta needs no division by b follows from (I + L) V' = b (v - K S).
"""

import triton
import triton.language as tl

from models.kda.kernels.parts import exp2, gate_slice, level_mask, sigmoid, softplus, sum_matrix


@triton.jit
def scan_back_kernel(
    qd_ptr, kd_ptr, kt_ptr, A_ptr, T_ptr, decay_ptr, b_ptr, do_ptr, first_ptr, last_ptr, dv_ptr, w_ptr, states_ptr,
    segments_ptr, jobs_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, MAP: tl.constexpr, SEGMENTED: tl.constexpr, HAS_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Run a segment from its last chunk to its first; forward.scan_kernel mirrored, R [K, BV] in registers.

    do: [tokens, H, V]. Without MAP: dv [tokens, H, V], W [chunks, H, C, V] and the R behind each chunk [chunks, H, K,
    V], all in the inputs' dtype; last_ptr gets the initial states' gradient [sequences, H, K, V], float32.
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
    R = tl.zeros([K, BV], tl.float32)
    if HAS_FIRST:
        if MAP:
            known = (keys[:, None] < K) & (cols < V * ends * (1 - part))[None, :]
            R = tl.load(first_ptr + (sequence * H + h).to(tl.int64) * K * V + here, mask=known, other=0.0)
        else:
            index = segment if SEGMENTED else sequence
            R = tl.load(first_ptr + (index * H + h).to(tl.int64) * K * V + here, mask=inside, other=0.0)
    if MAP:
        R += tl.where(keys[:, None] == cols[None, :], part.to(tl.float32), 0.0)
    for n in tl.range(0, count, num_stages=STAGES):
        c = (begin + count - 1 - n).to(tl.int64)
        at = c * H + h
        tokens = start + (count - 1 - n) * C + rows
        given = (tokens < end)[:, None] & (cols < V * (1 - part))[None, :]
        there = (tokens[:, None] * H + h) * V + cols[None, :]
        qd = tl.load(qd_ptr + at * C * K + rows[:, None] * K + keys[None, :])
        kd = tl.load(kd_ptr + at * C * K + rows[:, None] * K + keys[None, :])
        kt = tl.load(kt_ptr + at * C * K + rows[:, None] * K + keys[None, :])
        A = tl.load(A_ptr + at * C * C + rows[:, None] * C + rows[None, :])
        T = tl.load(T_ptr + at * C * C + rows[:, None] * C + rows[None, :])
        decay = tl.load(decay_ptr + at * K + keys)
        b = tl.load(b_ptr + at * C + rows)
        do = tl.load(do_ptr + there, mask=given, other=0.0)
        R_op = R.to(OP)
        new = tl.dot(tl.trans(A), do, input_precision=PRECISION)
        new = tl.dot(kt, R_op, new, input_precision=PRECISION)
        w = tl.dot(tl.trans(T), new.to(OP), input_precision=PRECISION)
        bw = b[:, None] * w
        if not MAP:
            seen = (tokens < end)[:, None] & (cols < V)[None, :]
            tl.store(states_ptr + at * K * V + here, R_op, mask=inside)
            to = at * C * V + rows[:, None] * V + cols[None, :]
            tl.store(w_ptr + to, w.to(OP), mask=(rows[:, None] < C) & (cols < V)[None, :])
            tl.store(dv_ptr + there, bw.to(OP), mask=seen)
        R = tl.dot(tl.trans(qd), do, R * decay[:, None], input_precision=PRECISION)
        R = tl.dot(tl.trans(kd), (-bw).to(OP), R, input_precision=PRECISION)
    if MAP:
        D: tl.constexpr = max(K, V)
        to = ((segment * H + h) * 2 + part).to(tl.int64) * K * D + keys[:, None] * D + cols[None, :]
        tl.store(last_ptr + to, R, mask=(keys[:, None] < K) & (cols < D)[None, :])
    elif begins:
        tl.store(last_ptr + (sequence * H + h).to(tl.int64) * K * V + here, R, mask=inside)


@triton.jit
def products_back_kernel(
    do_ptr, new_ptr, w_ptr, b_ptr, chunks_ptr, squares_ptr, dbeta_ptr,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_qk, dP and their transposes [chunks, H, 4, C, C], dbeta [tokens, H], in the inputs' dtype.

    One program a (head, chunk). The transposes are kept because columns_back_kernel needs masked ones, and `tl.trans`
    of what was made in registers costs a detour.
    """
    h = tl.program_id(0)
    c = tl.program_id(1).to(tl.int64)
    at = c * H + h
    rows = tl.arange(0, C)
    cols = tl.arange(0, V)
    i = rows[:, None]
    j = rows[None, :]
    tokens = tl.load(chunks_ptr + 2 * c).to(tl.int64) + rows
    valid = rows < tl.load(chunks_ptr + 2 * c + 1)
    there = (tokens[:, None] * H + h) * V + cols[None, :]
    do = tl.load(do_ptr + there, mask=valid[:, None] & (cols < V)[None, :], other=0.0)
    new = tl.load(new_ptr + at * C * V + i * V + cols[None, :])
    w = tl.load(w_ptr + at * C * V + i * V + cols[None, :])
    b = tl.load(b_ptr + at * C + rows)
    square = at * 4 * C * C + i * C + j
    dA = tl.dot(do, tl.trans(new), input_precision=PRECISION)
    tl.store(squares_ptr + square, tl.where(i >= j, dA, 0.0).to(OP))
    dP = tl.dot(w, tl.trans(new), input_precision=PRECISION) * -b[:, None]
    tl.store(squares_ptr + square + C * C, tl.where(i > j, dP, 0.0).to(OP))
    dA = tl.dot(new, tl.trans(do), input_precision=PRECISION)
    tl.store(squares_ptr + square + 2 * C * C, tl.where(i <= j, dA, 0.0).to(OP))
    dP = tl.dot(new, tl.trans(w), input_precision=PRECISION) * -b[None, :]
    tl.store(squares_ptr + square + 3 * C * C, tl.where(i < j, dP, 0.0).to(OP))
    dbeta = (1.0 - b) * tl.sum(w.to(tl.float32) * new.to(tl.float32), 1)
    tl.store(dbeta_ptr + tokens * H + h, dbeta.to(dbeta_ptr.dtype.element_ty), mask=valid)


@triton.jit
def states_back_kernel(
    do_ptr, new_ptr, w_ptr, b_ptr, S_ptr, R_ptr, decay_ptr, chunks_ptr, dqd_ptr, dkd_ptr, dkt_ptr, dlast_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dKt [chunks, H, C, K] in the inputs' dtype, and dG_C by the state's decay [chunks, H, K], float32.

    One program a (block of BK keys, head, chunk).
    """
    keys = tl.program_id(0) * BK + tl.arange(0, BK)
    h = tl.program_id(1)
    c = tl.program_id(2).to(tl.int64)
    at = c * H + h
    rows = tl.arange(0, C)
    cols = tl.arange(0, V)
    tokens = tl.load(chunks_ptr + 2 * c).to(tl.int64) + rows
    valid = rows < tl.load(chunks_ptr + 2 * c + 1)
    state = at * K * V + keys[:, None] * V + cols[None, :]
    S = tl.load(S_ptr + state)
    R = tl.load(R_ptr + state)
    dlast = tl.sum(S.to(tl.float32) * R.to(tl.float32), 1) * tl.load(decay_ptr + at * K + keys)
    tl.store(dlast_ptr + at * K + keys, dlast)
    there = (tokens[:, None] * H + h) * V + cols[None, :]
    do = tl.load(do_ptr + there, mask=valid[:, None] & (cols < V)[None, :], other=0.0)
    out = at * C * K + rows[:, None] * K + keys[None, :]
    tl.store(dqd_ptr + out, tl.dot(do, tl.trans(S), input_precision=PRECISION).to(OP))
    w = tl.load(w_ptr + at * C * V + rows[:, None] * V + cols[None, :])
    b = tl.load(b_ptr + at * C + rows)
    tl.store(dkd_ptr + out, (tl.dot(w, tl.trans(S), input_precision=PRECISION) * -b[:, None]).to(OP))
    new = tl.load(new_ptr + at * C * V + rows[:, None] * V + cols[None, :])
    tl.store(dkt_ptr + out, tl.dot(new, tl.trans(R), input_precision=PRECISION).to(OP))


@triton.jit
def chunk_slice(
    q_ptr, k_ptr, g_ptr, A_log_ptr, dt_bias_ptr, norms_ptr, tokens, valid, rows, cols, h, at,
    q_stride, k_stride, g_stride,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    LOWER: tl.constexpr, SUM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Normalised q (times scale) and k, the log2 decay, and which of them are there; [C, BK]."""
    mask = valid[:, None] & (cols < K)[None, :]
    rate = tl.exp(tl.minimum(tl.load(A_log_ptr + h), 30.0))
    bias = tl.load(dt_bias_ptr + h * K + cols)
    g = gate_slice(g_ptr, tokens[:, None] * g_stride + h * K + cols[None, :], mask, bias, rate, LOWER, SUM, FAST)
    q = tl.load(q_ptr + tokens[:, None] * q_stride + h * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    k_at = tokens[:, None] * k_stride + (h // GROUP) * K + cols[None, :]
    k = tl.load(k_ptr + k_at, mask=mask, other=0.0).to(tl.float32)
    q *= tl.load(norms_ptr + at * 2 * C + rows)[:, None]
    k *= tl.load(norms_ptr + at * 2 * C + C + rows)[:, None]
    return q, k, g, mask


@triton.jit
def rows_back_kernel(
    q_ptr, k_ptr, g_ptr, A_log_ptr, dt_bias_ptr, chunks_ptr, sums_ptr, back_ptr, norms_ptr,
    squares_ptr, dqd_ptr, dkd_ptr, dq_ptr, dk_ptr, dg_ptr,
    q_stride, k_stride, g_stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    LOWER: tl.constexpr, OP: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The rows' side: the gradient of the normalised q, a for k, and their part of dg; [tokens, H, K], in the inputs'
    dtype. One program a (block of BK keys, head, chunk).

    Levels as in forward.meet, A_ij = sum_d q_i E_i k_j E_j and k for q. A bounded gate needs only the two upper ones,
    and its blocks of 16 as one, relative to their start: at most exp(80), of which both sides take half.
    """
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    at = n * H + h
    rows = tl.arange(0, C)
    tokens = tl.load(chunks_ptr + 2 * n).to(tl.int64) + rows
    valid = rows < tl.load(chunks_ptr + 2 * n + 1)
    i = rows[:, None]
    j = rows[None, :]
    q, k, g, mask = chunk_slice(
        q_ptr, k_ptr, g_ptr, A_log_ptr, dt_bias_ptr, norms_ptr, tokens, valid, rows, cols, h, at,
        q_stride, k_stride, g_stride, H, GROUP, K, C, LOWER, SUM, FAST,
    )  # fmt: skip
    wide = at * C * K + i * K + cols[None, :]
    whole = exp2(tl.dot(sum_matrix(sums_ptr, 0, C), g, input_precision=PRECISION), FAST)
    dq = whole * tl.load(dqd_ptr + wide).to(tl.float32)
    a = whole * tl.load(dkd_ptr + wide).to(tl.float32)
    dg = tl.dot(sum_matrix(back_ptr, 0, C), (q * dq + k * a).to(OP), input_precision=PRECISION)
    square = squares_ptr + at * 4 * C * C + i * C + j
    dA, dP = tl.load(square), tl.load(square + C * C)
    # A token's own product has no decay.
    dq += tl.sum(tl.where(i == j, dA, 0.0).to(tl.float32), 1)[:, None] * k
    LEVELS: tl.constexpr = 4 if LOWER != 0 else 0
    for level in range(LEVELS, 6):
        matrix = (6 + level) * C * C + i * C + j
        E = exp2(tl.dot(tl.load(sums_ptr + matrix), g, input_precision=PRECISION), FAST)
        near = level_mask(i, j, 1 << level)
        columns = (k * E).to(OP)
        own_dq = E * tl.dot(tl.where(near, dA, 0.0).to(OP), columns, input_precision=PRECISION)
        own_a = E * tl.dot(tl.where(near, dP, 0.0).to(OP), columns, input_precision=PRECISION)
        dq += own_dq
        a += own_a
        Z = (q * own_dq + k * own_a).to(OP)
        dg = tl.dot(tl.load(back_ptr + matrix), Z, dg, input_precision=PRECISION)
    if LOWER != 0:
        x = tl.dot(sum_matrix(sums_ptr, 12, C), g, input_precision=PRECISION)
        near = (i // 16 == j // 16) & (j < i)
        columns = (k * exp2(-58.0 - x, FAST)).to(OP)
        E = exp2(58.0 + x, FAST)
        own_dq = E * tl.dot(tl.where(near, dA, 0.0).to(OP), columns, input_precision=PRECISION)
        own_a = E * tl.dot(tl.where(near, dP, 0.0).to(OP), columns, input_precision=PRECISION)
        dq += own_dq
        a += own_a
        Z = (q * own_dq + k * own_a).to(OP)
        dg = tl.dot(sum_matrix(back_ptr, 12, C), Z, dg, input_precision=PRECISION)
    out = (tokens[:, None] * H + h) * K + cols[None, :]
    tl.store(dq_ptr + out, (scale * dq).to(OP), mask=mask)
    tl.store(dk_ptr + out, a.to(OP), mask=mask)
    tl.store(dg_ptr + out, dg.to(OP), mask=mask)


@triton.jit
def columns_back_kernel(
    q_ptr, k_ptr, g_ptr, A_log_ptr, dt_bias_ptr, chunks_ptr, sums_ptr, back_ptr, norms_ptr,
    squares_ptr, dkt_ptr, dlast_ptr, dk_ptr, dg_ptr, drate_ptr, dbias_ptr,
    q_stride, k_stride, g_stride,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    LOWER: tl.constexpr, OP: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The columns' side, added to what rows_back_kernel left: the gradients of the normalised k and of the gate input
    [tokens, H, K], in the inputs' dtype, and of A_log and dt_bias summed over the chunk [chunks, H, K], float32
    (A_log's still to be summed over K). One program a (block of BK keys, head, chunk).
    """
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    at = n * H + h
    rows = tl.arange(0, C)
    tokens = tl.load(chunks_ptr + 2 * n).to(tl.int64) + rows
    valid = rows < tl.load(chunks_ptr + 2 * n + 1)
    i = rows[:, None]
    j = rows[None, :]
    q, k, g, mask = chunk_slice(
        q_ptr, k_ptr, g_ptr, A_log_ptr, dt_bias_ptr, norms_ptr, tokens, valid, rows, cols, h, at,
        q_stride, k_stride, g_stride, H, GROUP, K, C, LOWER, SUM, FAST,
    )  # fmt: skip
    tail = exp2(tl.dot(sum_matrix(sums_ptr, 1, C), g, input_precision=PRECISION), FAST)
    c = tail * tl.load(dkt_ptr + at * C * K + i * K + cols[None, :]).to(tl.float32)
    dg = tl.dot(sum_matrix(back_ptr, 1, C), (k * c).to(OP), input_precision=PRECISION)
    dg += tl.load(dlast_ptr + at * K + cols)[None, :]
    square = squares_ptr + at * 4 * C * C + 2 * C * C + i * C + j
    dA, dP = tl.load(square), tl.load(square + C * C)
    c += tl.sum(tl.where(i == j, dA, 0.0).to(tl.float32), 1)[:, None] * q
    LEVELS: tl.constexpr = 4 if LOWER != 0 else 0
    for level in range(LEVELS, 6):
        matrix = (6 + level) * C * C + i * C + j
        E = exp2(tl.dot(tl.load(sums_ptr + matrix), g, input_precision=PRECISION), FAST)
        near = level_mask(j, i, 1 << level)
        own = tl.dot(tl.where(near, dA, 0.0).to(OP), (q * E).to(OP), input_precision=PRECISION)
        own = E * tl.dot(tl.where(near, dP, 0.0).to(OP), (k * E).to(OP), own, input_precision=PRECISION)
        c += own
        dg = tl.dot(tl.load(back_ptr + matrix), (k * own).to(OP), dg, input_precision=PRECISION)
    if LOWER != 0:
        x = tl.dot(sum_matrix(sums_ptr, 12, C), g, input_precision=PRECISION)
        near = (i // 16 == j // 16) & (i < j)
        E = exp2(58.0 + x, FAST)
        own = tl.dot(tl.where(near, dA, 0.0).to(OP), (q * E).to(OP), input_precision=PRECISION)
        own = tl.dot(tl.where(near, dP, 0.0).to(OP), (k * E).to(OP), own, input_precision=PRECISION)
        own *= exp2(-58.0 - x, FAST)
        c += own
        dg = tl.dot(sum_matrix(back_ptr, 12, C), (-k * own).to(OP), dg, input_precision=PRECISION)
    out = (tokens[:, None] * H + h) * K + cols[None, :]
    dg += tl.load(dg_ptr + out, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(dk_ptr + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(dk_ptr + out, (a + c).to(OP), mask=mask)
    A_log = tl.load(A_log_ptr + h)
    rate = tl.exp(tl.minimum(A_log, 30.0))
    x = tl.load(g_ptr + tokens[:, None] * g_stride + h * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    x += tl.load(dt_bias_ptr + h * K + cols)[None, :]
    LOG2E: tl.constexpr = 1.4426950408889634
    if LOWER != 0:
        s = sigmoid(rate * LOG2E * x, FAST)
        dx = rate * LOWER * s * (1.0 - s) * dg
        drate = dx * x
    else:
        dx = -rate * sigmoid(LOG2E * x, FAST) * dg
        drate = dg * (-rate * softplus(x))
    dx = tl.where(mask, dx, 0.0)
    drate = tl.where(mask, drate, 0.0) * tl.where(A_log <= 30.0, 1.0, 0.0)
    tl.store(dg_ptr + out, dx.to(OP), mask=mask)
    tl.store(drate_ptr + at * K + cols, tl.sum(drate, 0))
    tl.store(dbias_ptr + at * K + cols, tl.sum(dx, 0))


@triton.jit
def unnormalise(x, dx, EPS: tl.constexpr):
    """Gradient of x given that of x / sqrt(|x|^2 + EPS), row by row."""
    inverse = tl.rsqrt(tl.sum(x * x, 1) + EPS)[:, None]
    unit = x * inverse
    return inverse * (dx - unit * tl.sum(unit * dx, 1)[:, None])


@triton.jit
def norms_back_kernel(
    q_ptr, k_ptr, dq_ptr, dk_ptr, to_q_ptr, to_k_ptr, tokens_count, q_stride, k_stride,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """From the gradients of the normalised q and k [tokens, H, K] to those of q [tokens, H, K] and k [tokens, H /
    GROUP, K]; one program a (block of BT tokens, k head)."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    hk = tl.program_id(1)
    cols = tl.arange(0, K)
    mask = (tokens < tokens_count)[:, None] & (cols < K)[None, :]
    dk = tl.zeros([BT, K], tl.float32)
    for n in range(0, GROUP):
        h = hk * GROUP + n
        there = (tokens[:, None] * H + h) * K + cols[None, :]
        q = tl.load(q_ptr + tokens[:, None] * q_stride + h * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dq = tl.load(dq_ptr + there, mask=mask, other=0.0).to(tl.float32)
        tl.store(to_q_ptr + there, unnormalise(q, dq, EPS).to(to_q_ptr.dtype.element_ty), mask=mask)
        dk += tl.load(dk_ptr + there, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + tokens[:, None] * k_stride + hk * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    there = (tokens[:, None] * (H // GROUP) + hk) * K + cols[None, :]
    tl.store(to_k_ptr + there, unnormalise(k, dk, EPS).to(to_k_ptr.dtype.element_ty), mask=mask)
