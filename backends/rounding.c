/* What torch does in ten passes over a block, in one; each function gives the bits of the eager code that names it. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

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

/* Element.nearest: a value's own power of two times 1.5 * 2^(23 - mantissa bits), added and removed. */
void nearest(const float *values, float *rounded, size_t count, int exponent_bits, int mantissa_bits, float largest)
{
    uint32_t smallest_normal = (uint32_t)(BIAS + 2 - (1 << (exponent_bits - 1))) << MANTISSA;
    uint32_t wider = ((uint32_t)(MANTISSA - mantissa_bits) << MANTISSA) + (1u << (MANTISSA - 1));
    for (size_t i = 0; i < count; i++) {
        float value = values[i];
        value = value > largest ? largest : value;
        value = value < -largest ? -largest : value;
        uint32_t exponent = bits(value) & EXPONENT;
        float anchor = number((exponent < smallest_normal ? smallest_normal : exponent) + wider);
        rounded[i] = (value + anchor) - anchor;
    }
}

/* Element.codes_of: sign, exponent and mantissa of the nearest number; ties to even, saturating. NaN: all ones. */
void codes(const float *values, uint8_t *found, size_t count, int exponent_bits, int mantissa_bits, float largest)
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
void places(const float *values, uint8_t *found, size_t count, const float bounds[15])
{
    for (size_t i = 0; i < count; i++) {
        uint32_t place = 0;
        for (int k = 0; k < 15; k++)
            place += values[i] > bounds[k];
        found[i] = (uint8_t)place;
    }
}
