//! Curves as SVG: losses and Dice against steps.
//!
//! Long runs are thinned out before they are drawn: a curve has at most [`POINTS_MAX`] points, a
//! point being the mean over its stretch of steps. For papers and slides: the page draws its own.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use super::ReportError;
use super::text::escape;

/// Most points that one curve is drawn with.
pub const POINTS_MAX: usize = 400;

const SIZE: (u32, u32) = (880, 360);
/// Stands for "the colour of the text" until the SVG is done.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_SVG: &str = "#010203";
/// Okabe and Ito, those that show on white as well as on black.
const LINES: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(128, 128, 128),
];

/// One curve: a name, and values at steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// What the legend says.
    pub name: String,
    /// Step and value, in order of steps.
    pub points: Vec<(f64, f64)>,
}

/// How values map to height.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// From zero to one: Dice.
    Unit,
    /// Logarithmic over what there is: losses. Values that are not positive are left out.
    Logarithmic,
}

/// At most `most` points: means over equal stretches.
#[must_use]
pub fn thin_out(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let stretch = points.len().div_ceil(most.max(1)).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        let sum = chunk.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / n, sum.1 / n)
    };
    points.chunks(stretch).map(mean).collect()
}

/// Draws `curves` under `title`.
///
/// # Errors
/// When the plotting library fails.
pub fn draw(title: &str, curves: &[Curve], scale: Scale) -> Result<String, ReportError> {
    let drawable = |value: f64| value.is_finite() && (scale == Scale::Unit || value > 0.0);
    let curves: Vec<Curve> = curves
        .iter()
        .map(|curve| {
            let points: Vec<_> = curve.points.iter().copied().filter(|p| drawable(p.1)).collect();
            Curve { name: curve.name.clone(), points: thin_out(&points, POINTS_MAX) }
        })
        .filter(|curve| !curve.points.is_empty())
        .collect();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = match scale {
            _ if curves.is_empty() => nothing(&root),
            Scale::Unit => lines(&root, &curves, 0.0..1.0, SeriesLabelPosition::LowerRight),
            Scale::Logarithmic => {
                let (low, high) = range(&curves);
                let heights = (low * 0.8..high * 1.25).log_scale();
                lines(&root, &curves, heights, SeriesLabelPosition::UpperRight)
            }
        };
        drawn.and_then(|()| root.present().map_err(plotting))?;
    }
    Ok(dress(&svg, title))
}

fn plotting(error: impl std::fmt::Display) -> ReportError {
    ReportError::Plot(error.to_string())
}

fn range(curves: &[Curve]) -> (f64, f64) {
    let values = || curves.iter().flat_map(|curve| &curve.points).map(|point| point.1);
    (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn nothing(root: &Area<'_>) -> Result<(), ReportError> {
    let text =
        Text::new("nothing recorded yet", (380, 170), ("sans-serif", 16).into_font().color(&INK));
    root.draw(&text).map_err(plotting)
}

fn lines<Y>(
    root: &Area<'_>,
    curves: &[Curve],
    y_range: impl AsRangedCoord<CoordDescType = Y, Value = f64>,
    legend: SeriesLabelPosition, // where curves of this kind rarely are: Dice rises, losses fall
) -> Result<(), ReportError>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let label = ("sans-serif", 13).into_font().color(&INK);
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(steps(curves), y_range)
        .map_err(plotting)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(INK.mix(0.18))
        .light_line_style(TRANSPARENT)
        .axis_style(INK.mix(0.5))
        .label_style(label.clone())
        .x_labels(8)
        .y_labels(6)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| short(*value))
        .x_desc("step")
        .draw()
        .map_err(plotting)?;
    for (index, curve) in curves.iter().enumerate() {
        let style = LINES[index % LINES.len()].stroke_width(2);
        let series = LineSeries::new(curve.points.iter().copied(), style).point_size(dot(curve));
        chart
            .draw_series(series)
            .map_err(plotting)?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .label_font(label)
        .border_style(TRANSPARENT)
        .draw()
        .map_err(plotting)
}

/// Few points are marked, so that a single one is seen at all.
fn dot(curve: &Curve) -> u32 {
    if curve.points.len() <= 40 { 3 } else { 0 }
}

fn steps(curves: &[Curve]) -> Range<f64> {
    let last = curves
        .iter()
        .filter_map(|curve| curve.points.last())
        .map(|point| point.0)
        .fold(1.0, f64::max);
    0.0..last * 1.02
}

fn short(value: f64) -> String {
    match value.abs() {
        v if v == 0.0 || (0.01..1000.0).contains(&v) => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{value:.0e}"),
    }
}

/// On white, with a title that screen readers say.
fn dress(svg: &str, title: &str) -> String {
    let title = escape(title);
    let named = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{title}\" "), 1);
    let white =
        format!("<title>{title}</title><rect width=\"100%\" height=\"100%\" fill=\"#FFFFFF\"/>");
    let start = named.find("<svg ").and_then(|at| named[at..].find('>').map(|end| at + end + 1));
    let whole = match start {
        Some(at) => format!("{}{white}{}", &named[..at], &named[at..]),
        None => named,
    };
    whole.replace(INK_SVG, "#222222")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(n: usize) -> Curve {
        Curve {
            name: "a<b".into(),
            points: (0..n).map(|i| (i as f64, 1.0 / (i + 1) as f64)).collect(),
        }
    }

    #[test]
    fn a_long_curve_keeps_its_ends_and_loses_its_length() {
        let thin = thin_out(&curve(50_000).points, POINTS_MAX);
        assert!(thin.len() <= POINTS_MAX);
        assert!(thin[0].0 < 200.0 && thin[thin.len() - 1].0 > 49_800.0);
        assert_eq!(thin_out(&curve(10).points, POINTS_MAX), curve(10).points);
        let picture = draw("t", &[curve(50_000)], Scale::Logarithmic).unwrap();
        assert!(picture.len() < 60_000, "{}", picture.len());
    }

    #[test]
    fn names_are_escaped_and_nothing_can_be_drawn_too() {
        let picture = draw("x\"y", &[curve(3)], Scale::Unit).unwrap();
        assert!(picture.contains("a&lt;b") && !picture.contains("a<b"));
        assert!(picture.contains("x&quot;y") && !picture.contains(INK_SVG));
        let nan = Curve { name: "n".into(), points: vec![(1.0, f64::NAN)] };
        assert!(draw("t", &[nan], Scale::Logarithmic).unwrap().contains("nothing recorded"));
        let single = Curve { name: "s".into(), points: vec![(5.0, 0.25)] };
        assert!(draw("t", &[single], Scale::Logarithmic).is_ok());
    }
}
