// Instances of a template for each value of an integer that is known at run time only.
#pragma once
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

template <class Of, int... N>
static constexpr auto variants_of(const Of& of, std::integer_sequence<int, N...>) {
  using One = decltype(of(std::integral_constant<int, 1>()));
  return std::array<One, sizeof...(N)>{{of(std::integral_constant<int, N + 1>())...}};
}
// {of(1), …, of(COUNT)}: functions, or arrays of them. The arguments are constants of a type.
template <int COUNT, class Of>
static constexpr auto variants(const Of& of) {
  return variants_of(of, std::make_integer_sequence<int, COUNT>());
}

// Calls work(n) with `n`, from 1 to MOST, as a constant of a type.
template <int MOST, class Work>
static void with_constant(int64_t n, const Work& work) {
  if constexpr (MOST > 1) {
    if (n < MOST) return with_constant<MOST - 1>(n, work);
  }
  work(std::integral_constant<int, MOST>());
}
