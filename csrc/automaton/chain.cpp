// Backward over the rows of a canvas, then the conditioned chain forward: see chain.h.
//
// Sums run over numbers scaled to their row, one multiplication a pair, as long as nothing that
// counts is lost to underflow; a state for which it might be is summed in the log domain.

#include "chain.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

// What is worth the wider registers of newer processors is compiled for each, chosen at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define VD_WIDE __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define VD_WIDE
#endif

namespace {

constexpr double none = -std::numeric_limits<double>::infinity();
constexpr float none_f = -std::numeric_limits<float>::infinity();
constexpr int32_t far = std::numeric_limits<int32_t>::max();
// Scaled numbers below `nothing` are zero. A sum of them and larger ones is good to the last bits
// from `enough` on, whatever was lost.
constexpr double nothing = 1e-300, enough = 1e-280;
const double log_nothing = std::log(nothing);
// Probabilities that no statistic in fp32 sees.
constexpr double unseen = 1e-30;
// Rows whose classes are summed into sets at once, side by side.
constexpr int64_t lanes = 8;

// exp(value) of a scaled value, at most about 0.
double scaled(double value) { return value < log_nothing ? 0.0 : std::exp(value); }

using Masses = double __attribute__((vector_size(lanes * sizeof(double)), aligned(8), may_alias));
using Tokens = float __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias));

// Every set's sum of the masses [C, lanes] of its classes, [lanes, S].
VD_WIDE void sum_sets(const vd_automaton &automaton, const double *masses, double *set_masses) {
    const Masses *mass = reinterpret_cast<const Masses *>(masses);
    for (int32_t set = 0; set < automaton.sets; ++set) {
        Masses sum = {};
        for (int32_t i = automaton.set_first[set]; i < automaton.set_first[set + 1]; ++i)
            sum += mass[automaton.set_class[i]];
        for (int64_t lane = 0; lane < lanes; ++lane)
            set_masses[lane * automaton.sets + set] = sum[lane];
    }
}

// The largest of the tokens' logs [C, lanes] of its classes, [lanes, S].
VD_WIDE void best_of_sets(const vd_automaton &automaton, const float *logs, float *set_logs) {
    const Tokens *log = reinterpret_cast<const Tokens *>(logs);
    for (int32_t set = 0; set < automaton.sets; ++set) {
        Tokens best = log[automaton.set_class[automaton.set_first[set]]];
        for (int32_t i = automaton.set_first[set] + 1; i < automaton.set_first[set + 1]; ++i) {
            const Tokens next = log[automaton.set_class[i]];
            best = best < next ? next : best;
        }
        for (int64_t lane = 0; lane < lanes; ++lane)
            set_logs[lane * automaton.sets + set] = best[lane];
    }
}

// What flows through every set [lanes, S], added up for each of its classes [C, lanes].
VD_WIDE void share_sets(const vd_automaton &automaton, const double *flows, double *shares) {
    Masses *share = reinterpret_cast<Masses *>(shares);
    for (int32_t set = 0; set < automaton.sets; ++set) {
        Masses flow;
        for (int64_t lane = 0; lane < lanes; ++lane)
            flow[lane] = flows[lane * automaton.sets + set];
        for (int32_t i = automaton.set_first[set]; i < automaton.set_first[set + 1]; ++i)
            share[automaton.set_class[i]] += flow;
    }
}

class Chain {
   public:
    Chain(const vd_automaton &automaton, const vd_canvases &batch, int64_t canvas)
        : automaton(automaton),
          states(automaton.states),
          classes(automaton.classes),
          end(automaton.states - 1),
          length(batch.length),
          start(static_cast<int32_t>(batch.start[canvas])),
          rows(std::clamp<int64_t>(batch.rows[canvas], 0, batch.length)),
          left(std::min<int64_t>(batch.left[canvas], automaton.states)),
          log_mass(batch.log_mass + canvas * length * classes),
          token(batch.best_log_prob + canvas * length * classes),
          free(batch.free + canvas * length),
          top(length),
          mass(lanes * classes),
          tokens(lanes * classes),
          set_masses(lanes * automaton.sets),
          set_tokens(lanes * automaton.sets),
          weight((length + 1) * states, none),
          value((length + 1) * states, none),
          share((length + 1) * states),
          scale(length + 1) {}

    void condition(const vd_canvases &batch, int64_t canvas) {
        const int64_t at = canvas * length;
        reach();
        backward();
        batch.log_z[canvas] = weight[start];
        if (!(weight[start] > none)) rows = 0;
        forward(batch.marginal + at * classes, batch.ended + at);
        const float *uniforms = batch.uniforms + at;
        walk(batch.sample_class + at, nullptr, [&](int64_t row, int32_t state) {
            return drawn(row, state, uniforms[row]);
        });
        walk(batch.map_class + at, batch.map_state + at,
             [&](int64_t row, int32_t state) { return largest(row, state); });
    }

   private:
    const vd_automaton &automaton;
    const int32_t states, classes, end;
    const int64_t length;
    const int32_t start;
    int64_t rows, left;
    const float *log_mass, *token, *free;
    std::vector<int32_t> nearest;  // [N], fewest tokens from the start
    std::vector<double> top;       // [L], a row's largest log-mass
    // Of the rows at hand: masses beside the largest [C, lanes], tokens; of their sets [lanes, S].
    std::vector<double> mass;
    std::vector<float> tokens;
    std::vector<double> set_masses;
    std::vector<float> set_tokens;
    const double *set_mass = nullptr;  // [S], of one of these rows
    const float *set_token = nullptr;
    // [L + 1, N], the logs of the sum and of the largest of what may follow a state
    std::vector<double> weight, value;
    // The sums once more, beside exp of the scale [L + 1] of their row.
    std::vector<double> share, scale;

    // Whether the state can be met before the row and completed behind it.
    bool live(int64_t row, int32_t state) const {
        return nearest[state] <= row && automaton.distance[state] <= rows - row + left;
    }

    double through(int64_t row, const float *logs, const double *next, int32_t edge) const {
        return logs[row * classes + automaton.edge_class[edge]] +
               next[(row + 1) * states + automaton.edge_target[edge]];
    }

    void reach() {
        nearest.assign(states, far);
        nearest[start] = 0;
        std::vector<int32_t> found{start};
        for (size_t next = 0; next < found.size(); ++next) {
            const int32_t from = found[next];
            for (int32_t p = automaton.pair_first[from]; p < automaton.pair_first[from + 1]; ++p) {
                const int32_t target = automaton.pair_target[p];
                if (nearest[target] != far) continue;
                nearest[target] = nearest[from] + 1;
                found.push_back(target);
            }
        }
    }

    // The masses of `lanes` rows from `first` on; lanes behind the canvas repeat its last row.
    void read(int64_t first, bool with_tokens) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t row = std::min(first + lane, length - 1);
            const float *logs = log_mass + row * classes, *best = token + row * classes;
            const float most = std::accumulate(logs + 1, logs + classes, none_f,
                                               [](float a, float b) { return a < b ? b : a; });
            top[row] = std::isfinite(most) ? most : 0.0;
            for (int32_t c = 1; c < classes; ++c) {
                mass[lanes * c + lane] = scaled(logs[c] - top[row]);
                if (with_tokens) tokens[lanes * c + lane] = best[c];
            }
        }
        sum_sets(automaton, mass.data(), set_masses.data());
        if (with_tokens) best_of_sets(automaton, tokens.data(), set_tokens.data());
    }

    // The sets of one of these rows.
    void take(int64_t row) {
        set_mass = &set_masses[row % lanes * automaton.sets];
        set_token = &set_tokens[row % lanes * automaton.sets];
    }

    void backward() {
        for (int32_t state = 0; state < states; ++state) {
            const int64_t at = rows * states + state;
            weight[at] = value[at] = live(rows, state) ? 0.0 : none;
            share[at] = live(rows, state) ? 1.0 : 0.0;
        }
        for (int64_t row = rows - 1; row >= 0; --row) {
            if (row % lanes == lanes - 1 || row == rows - 1) read(row - row % lanes, true);
            take(row);
            const int64_t here = row * states, next = here + states;
            weight[here + end] = weight[next + end];
            value[here + end] = value[next + end] + free[row];
            double most = weight[here + end];
            for (int32_t state = 0; state < end; ++state) {
                if (!live(row, state)) continue;
                sum_pairs(row, state);
                most = std::max(most, weight[here + state]);
            }
            scale[row] = most > none ? most : 0.0;
            const double shift = std::exp(top[row] + scale[row + 1] - scale[row]);
            for (int32_t state = 0; state < states; ++state) {
                double &sum = share[here + state];
                sum = sum >= enough ? sum * shift : scaled(weight[here + state] - scale[row]);
            }
        }
    }

    // The weight and value of a state, and its share as far as it can be told without logs.
    void sum_pairs(int64_t row, int32_t state) {
        const double *after = &share[(row + 1) * states], *values = &value[(row + 1) * states];
        double sum = 0.0, best = none;
        for (int32_t p = automaton.pair_first[state]; p < automaton.pair_first[state + 1]; ++p) {
            const int32_t set = automaton.pair_set[p], target = automaton.pair_target[p];
            sum += set_mass[set] * after[target];
            best = std::max(best, set_token[set] + values[target]);
        }
        const int64_t here = row * states + state;
        value[here] = best;
        share[here] = sum;
        weight[here] =
            sum >= enough ? std::log(sum) + top[row] + scale[row + 1] : sum_logs(row, state);
    }

    double sum_logs(int64_t row, int32_t state) const {
        const int32_t first = automaton.edge_first[state], last = automaton.edge_first[state + 1];
        double most = none, sum = 0.0;
        for (int32_t e = first; e < last; ++e)
            most = std::max(most, through(row, log_mass, weight.data(), e));
        if (!(most > none)) return none;
        for (int32_t e = first; e < last; ++e) {
            const double beside = through(row, log_mass, weight.data(), e) - most;
            if (beside > -60.0) sum += std::exp(beside);
        }
        return most + std::log(sum);
    }

    // The chain given that the canvas is accepted: every number is a probability.
    void forward(float *marginal, float *ended) {
        std::vector<double> state(states), moved(states), flows, shared, said;
        state[start] = 1.0;
        std::fill(marginal, marginal + length * classes, 0.0f);
        std::fill(ended + rows, ended + length, 1.0f);
        for (int64_t first = 0; first < rows; first += lanes) {
            read(first, false);
            flows.assign(lanes * automaton.sets, 0.0);
            said.assign(lanes * classes, 0.0);
            shared.assign(lanes * classes, 0.0);
            const int64_t count = std::min(lanes, rows - first);
            for (int64_t lane = 0; lane < count; ++lane) {
                const int64_t row = first + lane;
                take(row);
                ended[row] = static_cast<float>(state[end]);
                std::fill(moved.begin(), moved.end(), 0.0);
                moved[end] = state[end];
                const double unshift = std::exp(scale[row] - top[row] - scale[row + 1]);
                for (int32_t from = 0; from < end; ++from)
                    if (state[from] >= unseen)
                        move(row, from, state[from], unshift, &flows[lane * automaton.sets],
                             moved.data(), &said[lane]);
                state.swap(moved);
            }
            share_sets(automaton, flows.data(), shared.data());
            for (int64_t lane = 0; lane < count; ++lane)
                for (int32_t c = 1; c < classes; ++c) {
                    const int64_t at = lanes * c + lane;
                    marginal[(first + lane) * classes + c] =
                        static_cast<float>(shared[at] * mass[at] + said[at]);
                }
        }
    }

    // Send the probability of a state through its edges: into the flow of their sets, what is left
    // of it there to be multiplied by the mass of a class, or into what the classes say at once.
    void move(int64_t row, int32_t from, double probability, double unshift, double *flow,
              double *moved, double *said) const {
        const double here = weight[row * states + from], *after = &share[(row + 1) * states];
        const double sum = share[row * states + from] * unshift;  // what sum_pairs found
        if (sum >= enough) {
            const double part = probability / sum;
            for (int32_t p = automaton.pair_first[from]; p < automaton.pair_first[from + 1]; ++p) {
                const int32_t set = automaton.pair_set[p], target = automaton.pair_target[p];
                const double goes = part * after[target];
                flow[set] += goes;
                moved[target] += goes * set_mass[set];
            }
            return;
        }
        for (int32_t e = automaton.edge_first[from]; e < automaton.edge_first[from + 1]; ++e) {
            const double goes =
                probability * scaled(through(row, log_mass, weight.data(), e) - here);
            said[lanes * automaton.edge_class[e]] += goes;
            moved[automaton.edge_target[e]] += goes;
        }
    }

    template <typename Choose>
    void walk(int64_t *said, int64_t *behind, Choose choose) const {
        int32_t state = start;
        for (int64_t row = 0; row < length; ++row) {
            const bool goes = row < rows && state != end;
            const int32_t edge = goes ? choose(row, state) : 0;
            said[row] = goes ? automaton.edge_class[edge] : -1;
            if (goes) state = automaton.edge_target[edge];
            if (behind != nullptr) behind[row] = state;
        }
    }

    // The first among equals: the lowest class.
    int32_t largest(int64_t row, int32_t state) const {
        int32_t best = automaton.edge_first[state];
        for (int32_t e = best + 1; e < automaton.edge_first[state + 1]; ++e)
            if (through(row, token, value.data(), e) > through(row, token, value.data(), best))
                best = e;
        return best;
    }

    int32_t drawn(int64_t row, int32_t state, double uniform) const {
        const double here = weight[row * states + state];
        double sum = 0.0;
        int32_t last = automaton.edge_first[state];
        for (int32_t e = last; e < automaton.edge_first[state + 1]; ++e) {
            const double goes = scaled(through(row, log_mass, weight.data(), e) - here);
            if (goes == 0.0) continue;
            last = e;
            sum += goes;
            if (sum > uniform) break;
        }
        return last;
    }
};

}  // namespace

extern "C" int32_t vd_condition(const vd_automaton *automaton, const vd_canvases *canvases,
                                int32_t threads) {
    if (automaton->states < 1 || automaton->classes < 1) return 1;
    for (int64_t b = 0; b < canvases->canvases; ++b)
        if (canvases->start[b] < 0 || canvases->start[b] >= automaton->states) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < canvases->canvases; ++b)
        Chain(*automaton, *canvases, b).condition(*canvases, b);
    return 0;
}
