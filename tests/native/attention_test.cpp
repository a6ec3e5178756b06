// Tests the native library through its public header: random problems on every ISA level, with
// arrays between protected pages, against the formula in double.
//
//   attention_test PROBLEMS [FIRST_SEED]
#include <cstdio>
#include <cstdlib>

#include "levels.h"
#include "problems.h"

int main(int count, char** arguments) {
  const uint64_t problems = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 300;
  const uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  int failures = 0;
  const bool all_ran = on_every_level([&](const char* isa) {
    double largest = 0;
    for (uint64_t seed = first; seed < first + problems; ++seed) {
      const RandomProblem problem(seed);
      if (problem.run() != numattn::Status::done) {
        std::printf("%s seed %llu: not done:%s\n", isa, static_cast<unsigned long long>(seed),
                    problem.description.c_str());
        ++failures;
        continue;
      }
      const double share = problem.error_share();
      if (share > 1) {
        std::printf("%s seed %llu: %.3g times the error allowed:%s\n", isa,
                    static_cast<unsigned long long>(seed), share, problem.description.c_str());
        ++failures;
      }
      largest = share > largest ? share : largest;
    }
    std::printf("%s: %llu problems, largest error %.2g of what is allowed\n", isa,
                static_cast<unsigned long long>(problems), largest);
  });
  return all_ran && failures == 0 ? 0 : 1;
}
