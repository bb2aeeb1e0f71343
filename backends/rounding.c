/* What torch does in ten passes over a block, in one; each function gives the bits of the eager code that names it. */

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "every operation has to be rounded to float"
#endif

enum { MANTISSA = 23, BIAS = 127, EXPONENT = 0x7F800000, MAGNITUDE = 0x7FFFFFFF };

static inline uint32_t bits(float value)
{
    uint32_t found;
    memcpy(&found, &value, sizeof found);
    return found;
}

static inline float number(uint32_t bits)
{
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

/* squared_error, not yet weighted and summed, of blocks times their reciprocals. Element.nearest: a value's own power
   of two times 1.5 * 2^(23 - mantissa bits), added and removed, rounds its mantissa. */
void squares(const float *restrict values, const float *restrict reciprocals, float *restrict found, size_t blocks,
             size_t size, int exponent_bits, int mantissa_bits, float largest)
{
    uint32_t smallest_normal = (uint32_t)(BIAS + 2 - (1 << (exponent_bits - 1))) << MANTISSA;
    uint32_t wider = ((uint32_t)(MANTISSA - mantissa_bits) << MANTISSA) + (1u << (MANTISSA - 1));
    for (size_t block = 0; block < blocks; block++, values += size, found += size)
        for (size_t i = 0; i < size; i++) {
            float value = values[i] * reciprocals[block];
            float clamped = value > largest ? largest : value;
            clamped = clamped < -largest ? -largest : clamped;
            uint32_t exponent = bits(clamped) & EXPONENT;
            float anchor = number((exponent < smallest_normal ? smallest_normal : exponent) + wider);
            float error = value - ((clamped + anchor) - anchor);
            found[i] = error * error;
        }
}

/* Blocks.rough_error, not yet weighted and summed: of values that a table holds as number * share; size <= 128. */
void table_squares(const float *restrict values, const float *restrict reciprocals, const float *restrict shares,
                   const float *restrict rough, float bins, float *restrict found, size_t blocks, size_t size)
{
    int32_t places[128]; /* of a block: to look them up one by one is faster than any gather */
    for (size_t block = 0; block < blocks; block++, values += size, found += size) {
        for (size_t i = 0; i < size; i++) {
            float place = values[i] * reciprocals[block] * bins;
            place = place < bins ? place : bins; /* NaN too */
            place = place > -bins ? place : -bins;
            places[i] = (int32_t)(place + (bins + 0.5f));
        }
        for (size_t i = 0; i < size; i++)
            found[i] = rough[places[i]];
        for (size_t i = 0; i < size; i++) {
            float error = found[i] * shares[block] - values[i];
            found[i] = error * error;
        }
    }
}

/* Element.store, not yet packed: sign, exponent and mantissa of the nearest number; ties to even, saturating. NaN: all ones. */
void codes(const float *restrict values, uint8_t *restrict found, size_t count, int exponent_bits, int mantissa_bits,
           float largest)
{
    int bias = (1 << (exponent_bits - 1)) - 1, sign = exponent_bits + mantissa_bits, cut = MANTISSA - mantissa_bits;
    uint32_t smallest_normal = (uint32_t)(BIAS + 1 - bias) << MANTISSA, below_half = (1u << (cut - 1)) - 1;
    uint32_t rebias = (uint32_t)(BIAS - bias) << mantissa_bits, not_a_number = (1u << sign) - 1;
    uint32_t in_steps = (uint32_t)(BIAS + 1 - bias + cut) << MANTISSA; /* a float of it counts subnormals' steps */
    for (size_t i = 0; i < count; i++) {
        float value = number(bits(values[i]) & MAGNITUDE);
        float size = value > largest ? largest : value;
        uint32_t normal = ((bits(size) + below_half + (bits(size) >> cut & 1)) >> cut) - rebias;
        uint32_t subnormal = bits(size + number(in_steps)) - in_steps;
        uint32_t code = bits(size) < smallest_normal ? subnormal : normal;
        code = value == value ? code : not_a_number;
        found[i] = (uint8_t)(code | bits(values[i]) >> 31 << sign);
    }
}

/* Table.nearest: how many of the bounds lie below the value. */
void places(const float *restrict values, uint8_t *restrict found, size_t count, const float *restrict bounds)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t place = 0;
        for (int k = 0; k < 15; k++)
            place += !(values[i] <= bounds[k]); /* NaN lies above all */
        found[i] = (uint8_t)place;
    }
}
