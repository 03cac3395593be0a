//! Images of few distinct values, stored as the values and a place among them for each pixel.
//!
//! A scanner's intensities are whole numbers, a few hundred in a slice, and most of what is done to them at
//! import (scaling, clipping, z-scores) leaves as many. The places take one or two bytes a pixel where floats
//! take four, and their low bytes compress better beside each other than between high ones: fewer bytes
//! to fetch, hash and decompress. Nothing is rounded: the values are the floats themselves.
//!
//! Pure functions on bytes. Which rows are stored so is decided in [`super::shard`].

use std::collections::HashSet;

/// An image, `planes` of `pixels` bytes each one after the other: of every pixel's place among `values` the
/// low byte, then, of more than 256 values, the high byte.
#[derive(Debug, Clone, PartialEq)]
pub struct Palette {
    /// Distinct values in ascending order (of `f32::total_cmp`: zeros of both signs are two).
    pub values: Vec<f32>,
    /// The places' bytes.
    pub planes: Vec<u8>,
}

impl Palette {
    /// Of `image`, if that takes less than half of its bytes.
    pub fn of(image: &[f32]) -> Option<Self> {
        // Four bytes a value and at most two a pixel: at half as many values as pixels nothing is gained.
        let most = (image.len() / 4).min(1 << 16);
        let mut distinct = HashSet::new();
        for value in image {
            if distinct.insert(value.to_bits()) && distinct.len() > most {
                return None;
            }
        }
        let mut values: Vec<f32> = distinct.into_iter().map(f32::from_bits).collect();
        values.sort_unstable_by(f32::total_cmp);
        let place = |value: &f32| {
            // Every pixel's value is among them.
            values.binary_search_by(|other| other.total_cmp(value)).unwrap_or_default()
        };
        let places: Vec<usize> = image.iter().map(place).collect();
        let mut planes: Vec<u8> = places.iter().map(|place| *place as u8).collect();
        if values.len() > 256 {
            planes.extend(places.iter().map(|place| (place >> 8) as u8));
        }
        Some(Self { values, planes })
    }
}

/// Puts the image of `pixels` pixels that `values` (little-endian floats) and `planes` are behind what is in
/// `image`, or says why they are none.
pub fn append(
    image: &mut Vec<f32>,
    values: &[u8],
    planes: &[u8],
    pixels: usize,
) -> Result<(), String> {
    let (words, rest) = values.as_chunks::<4>();
    let wide = words.len() > 256;
    let bytes = pixels * if wide { 2 } else { 1 };
    if !rest.is_empty() || words.is_empty() || planes.len() != bytes {
        return Err(format!(
            "{} bytes of values and {} of places are no image of {pixels} pixels",
            values.len(),
            planes.len()
        ));
    }
    let (low, high) = planes.split_at(pixels);
    let last = if wide {
        low.iter()
            .zip(high)
            .fold(0, |last, (low, high)| last.max(u16::from_le_bytes([*low, *high])))
    } else {
        low.iter().fold(0, |last, low| last.max(*low)).into()
    };
    if usize::from(last) >= words.len() {
        return Err(format!("a pixel has place {last} of {}", words.len()));
    }
    // By rows of 256: a low byte then needs no check of bounds.
    let mut table = vec![[0.0; 256]; words.len().div_ceil(256)];
    for (value, word) in table.as_flattened_mut().iter_mut().zip(words) {
        *value = f32::from_le_bytes(*word);
    }
    if wide {
        let values = low.iter().zip(high);
        image.extend(values.map(|(low, high)| table[usize::from(*high)][usize::from(*low)]));
    } else {
        image.extend(low.iter().map(|low| table[0][usize::from(*low)]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(palette: &Palette, pixels: usize) -> Result<Vec<f32>, String> {
        let values: Vec<u8> = palette.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut image = vec![7.0];
        append(&mut image, &values, &palette.planes, pixels)?;
        assert_eq!(image.remove(0).to_bits(), 7.0_f32.to_bits());
        Ok(image)
    }

    #[test]
    fn an_image_comes_back_bit_for_bit() {
        for distinct in [1, 2, 255, 256, 257, 400, 512, 513, 20_000, 65_536] {
            let image: Vec<f32> =
                (0..4 * distinct + 3).map(|at| (at * 7 % distinct) as f32 / 3.0 - 40.0).collect();
            let palette = Palette::of(&image).unwrap();
            assert_eq!(palette.values.len(), distinct);
            let planes = if distinct > 256 { 2 } else { 1 };
            assert_eq!(palette.planes.len(), planes * image.len());
            assert_eq!(back(&palette, image.len()).unwrap(), image);
        }
        let zeros = [0.0, -0.0, 0.0, -0.0, -0.0, 0.0, 0.0, 0.0, 0.0, -0.0];
        let again = back(&Palette::of(&zeros).unwrap(), zeros.len()).unwrap();
        assert!(again.iter().map(|value| value.to_bits()).eq(zeros.map(f32::to_bits)));
    }

    #[test]
    fn images_of_many_values_are_none() {
        let image: Vec<f32> = (0..4000).map(|at| (at % 1001) as f32).collect();
        assert_eq!(Palette::of(&image), None);
        let image: Vec<f32> = (0..4 * 65_537).map(|at| (at % 65_537) as f32).collect();
        assert_eq!(Palette::of(&image), None);
        assert_eq!(Palette::of(&[1.0]), None);
    }

    #[test]
    fn bytes_that_are_no_image_are_errors() {
        let image: Vec<f32> = (0..4000).map(|at| (at % 300) as f32).collect();
        let whole = Palette::of(&image).unwrap();
        assert!(back(&whole, 3999).unwrap_err().contains("3999 pixels"));
        let mut fewer = whole.clone();
        fewer.values.pop();
        assert!(back(&fewer, 4000).unwrap_err().contains("place 299 of 299"));
        fewer.values.clear();
        assert!(back(&fewer, 4000).is_err());
        fewer.values.truncate(200);
        let narrow = Palette { values: vec![0.5; 200], planes: whole.planes[..4000].to_vec() };
        assert!(back(&narrow, 4000).unwrap_err().contains("place 255 of 200"));
        let mut image = Vec::new();
        assert!(append(&mut image, &[0; 5], &[0; 3], 3).is_err());
        assert!(image.is_empty());
    }
}
