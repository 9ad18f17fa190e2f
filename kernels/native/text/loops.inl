// Bodies of the loops, included once by each loops_<level>.cpp inside a namespace of its own after
// that file has defined `separators`. Written so that the compiler turns them into vector code for
// whatever that file is compiled for.

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;
constexpr uint64_t kEmptyKey = 0xEF46DB3751D8E999u;  // XXH64 of no bytes

inline uint64_t rotate(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

// XXH64 with seed 0 of exactly 8 bytes.
inline uint64_t hash_lane(uint64_t lane) {
  uint64_t state = kPrime5 + 8;
  state ^= rotate(lane * kPrime2, 31) * kPrime1;
  state = rotate(state, 27) * kPrime1 + kPrime4;
  state = (state ^ (state >> 33)) * kPrime2;
  state = (state ^ (state >> 29)) * kPrime3;
  return state ^ (state >> 32);
}

void scan(const uint8_t* text, size_t bytes, uint8_t delimiter, Scan* scan) {
  uint32_t num_ends = 0;
  uint32_t num_newlines = 0;
  for (size_t at = 0; at < bytes && num_ends + 64 <= scan->max_ends; at += 64) {
    uint64_t newlines;
    uint64_t all = separators(text + at, delimiter, &newlines);
    if (bytes - at < 64) {
      const uint64_t inside = (uint64_t{1} << (bytes - at)) - 1;
      all &= inside;
      newlines &= inside;
    }
    append_positions(all, uint32_t(at), scan->ends + num_ends);
    for (; newlines != 0; newlines &= newlines - 1) {
      const uint64_t before = (newlines & -newlines) - 1;
      const uint32_t end = num_ends + uint32_t(__builtin_popcountll(all & before));
      scan->newlines[num_newlines++] = end;
      if (num_newlines == scan->max_newlines) {
        scan->num_ends = end + 1;
        scan->num_newlines = num_newlines;
        return;
      }
    }
    num_ends += uint32_t(__builtin_popcountll(all));
  }
  scan->num_ends = num_ends;
  scan->num_newlines = num_newlines;
}

void extract(const Rows* rows, uint32_t field, uint64_t* __restrict lanes,
             uint32_t* __restrict lengths) {
  const uint8_t* text = rows->text;
  const uint32_t* first = rows->first;
  const uint32_t count = rows->count;
  if (field == 0) {
    for (uint32_t row = 0; row < count; ++row) {
      const uint32_t begin = rows->start[row];
      lengths[row] = rows->ends[first[row]] - begin;
      __builtin_memcpy(&lanes[row], text + begin, 8);
    }
    return;
  }
  const uint32_t* ends = rows->ends + field;
  for (uint32_t row = 0; row < count; ++row) {
    const uint32_t* end = ends + first[row];
    const uint32_t begin = end[-1] + 1;
    lengths[row] = end[0] - begin;
    __builtin_memcpy(&lanes[row], text + begin, 8);
  }
}

uint32_t hash(const uint64_t* __restrict lanes, const uint32_t* __restrict lengths, uint32_t count,
              uint64_t* __restrict keys, uint32_t* __restrict others) {
  uint32_t any = 0;
  for (uint32_t row = 0; row < count; ++row) any |= lengths[row] & ~8u;
  for (uint32_t row = 0; row < count; ++row) {
    const uint64_t key = hash_lane(lanes[row]);
    keys[row] = lengths[row] == 0 ? kEmptyKey : key;
  }
  uint32_t num_others = 0;
  if (any != 0) {
    for (uint32_t row = 0; row < count; ++row) {
      others[num_others] = row;
      num_others += (lengths[row] & ~8u) != 0;
    }
  }
  return num_others;
}

uint32_t digits(const uint64_t* __restrict lanes, const uint32_t* __restrict lengths,
                uint32_t count, uint32_t* __restrict values, uint32_t* __restrict others) {
  constexpr uint64_t kZeros = 0x3030303030303030u;
  uint64_t any = 0;
  for (uint32_t row = 0; row < count; ++row) {
    const uint64_t length = lengths[row];
    // Last digit to the highest byte, zeros of either kind below the first.
    const uint64_t shift = (64 - 8 * length) & 63;
    uint64_t lane = (lanes[row] ^ kZeros) << shift;
    lane = length == 0 ? 0 : lane;
    // A byte over 9 reaches its top bit by adding 0x76, or has it already.
    uint64_t wrong = ((lane + 0x7676767676767676u) | lane) & 0x8080808080808080u;
    wrong |= length > 8;
    any |= wrong;
    // Digits to pairs to groups of four to eight, each step all groups at once.
    lane = lane * 10 + (lane >> 8);
    const uint64_t value = ((lane & 0x000000FF000000FFu) * 0x000F424000000064u +
                            ((lane >> 16) & 0x000000FF000000FFu) * 0x0000271000000001u) >>
                           32;
    values[row] = wrong != 0 ? kNotDigits : uint32_t(value);
  }
  uint32_t num_others = 0;
  if (any != 0) {
    for (uint32_t row = 0; row < count; ++row) {
      others[num_others] = row;
      const bool other = values[row] == kNotDigits;
      num_others += other;
      values[row] = other ? 0 : values[row];
    }
  }
  return num_others;
}

void look_up(const uint32_t* __restrict values, uint32_t count, const float* __restrict table,
             uint32_t table_size, float* __restrict out) {
  for (uint32_t row = 0; row < count; ++row) {
    const uint32_t value = values[row];
    const float found = table[value < table_size ? value : 0];
    out[row] = value < table_size ? found : __builtin_nanf("");
  }
}

void to_float(const uint32_t* __restrict values, uint32_t count, float* __restrict out) {
  for (uint32_t row = 0; row < count; ++row) out[row] = float(int32_t(values[row]));
}

void bucket(const uint64_t* __restrict keys, size_t count, uint32_t buckets,
            int32_t* __restrict out) {
  const uint64_t factor = buckets;
  for (size_t row = 0; row < count; ++row) {
    const uint64_t low = (keys[row] & 0xFFFFFFFFu) * factor;
    const uint64_t high = (keys[row] >> 32) * factor;
    out[row] = int32_t((high + (low >> 32)) >> 32);
  }
}

uint32_t count_empty(const uint32_t* lengths, uint32_t count) {
  uint32_t empty = 0;
  for (uint32_t row = 0; row < count; ++row) empty += lengths[row] == 0;
  return empty;
}
