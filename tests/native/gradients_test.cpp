// Tests the backward pass through its public header: gradients of random problems on every ISA
// level, with arrays between protected pages, against the formula in double.
//
//   gradients_test PROBLEMS [FIRST_SEED]
#include "gradients.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gradient_problems.h"
#include "levels.h"

int main(int count, char** arguments) {
  const uint64_t problems = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 300;
  const uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  int failures = 0;
  const bool all_ran = on_every_level([&](const char* isa) {
    double largest = 0;
    for (uint64_t seed = first; seed < first + problems; ++seed) {
      const RandomGradients problem(seed);
      const auto report = [&](const char* what, double share) {
        std::printf("%s seed %llu: %s (%.3g of what is allowed):%s\n", isa,
                    static_cast<unsigned long long>(seed), what, share,
                    problem.description.c_str());
        ++failures;
      };
      if (problem.run() != numattn::Status::done ||
          problem.run_backward(1) != numattn::Status::done) {
        report("not done", 0);
        continue;
      }
      const double share = problem.gradient_error_share();
      if (!(share <= 1)) report("wrong", share);
      largest = std::max(largest, share);
      const std::vector<char> alone = problem.gradients();
      if (problem.run_backward(3) != numattn::Status::done || problem.gradients() != alone) {
        report("other bits with three threads", share);
      }
    }
    std::printf("%s: %llu problems, largest error %.2g of what is allowed\n", isa,
                static_cast<unsigned long long>(problems), largest);
  });
  return all_ran && failures == 0 ? 0 : 1;
}
