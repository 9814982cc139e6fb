//! Curves, areas and strips as inline SVG. Pure.
//!
//! The drawings stretch to the width they are given (`preserveAspectRatio="none"`), so they hold no text:
//! that is HTML around them, and stays legible on a phone. Colours are classes of the page's style.

use std::fmt::Write as _;

use crate::admin::history::Role;

/// The width of a drawing, in its own units; right is now.
const WIDTH: f32 = 1000.0;
/// Its height.
const HEIGHT: f32 = 100.0;
/// Points further apart than this share of the width are not joined: there, nothing was known.
const GAP: f32 = 0.02;

/// One curve: where in time (0: the oldest, 1: now), and the value where it is known.
pub type Curve = Vec<(f32, Option<f32>)>;

/// The end of an axis that holds `greatest`: 1, 2 or 5 times a power of ten, `least` at least.
pub fn axis_end(greatest: f32, least: f32) -> f32 {
    let wanted = if greatest.is_finite() { greatest.max(least) } else { least };
    let power = 10f32.powf(wanted.log10().floor());
    // The last one against rounding: a power that came out a little small.
    [1.0, 2.0, 5.0, 10.0, 20.0]
        .into_iter()
        .map(|step| step * power)
        .find(|end| *end >= wanted)
        .unwrap_or(wanted)
}

/// Curves over the same axes. `what` is read out to those who do not see it.
pub fn curves(what: &str, curves: &[Curve], end: f32) -> String {
    let mut svg = begin("curves", what);
    for (index, curve) in curves.iter().enumerate() {
        let mut path = String::new();
        let mut last: Option<f32> = None;
        for (x, value) in curve {
            let Some(value) = value else {
                last = None;
                continue;
            };
            let joined = last.is_some_and(|before| x - before <= GAP);
            let command = if joined { 'L' } else { 'M' };
            let _ = write!(path, "{command}{:.1} {:.1}", x * WIDTH, y(*value, end));
            if !joined {
                // A point by itself is seen, too: the ends of a line are round.
                path.push_str("h.1");
            }
            last = Some(*x);
        }
        let _ = write!(svg, "<path class=\"line s{}\" d=\"{path}\"/>", index % 6);
    }
    svg + "</svg>"
}

/// Layers on top of each other: at each point in time one value for each layer.
pub fn areas(what: &str, points: &[(f32, Vec<f32>)], end: f32) -> String {
    let mut svg = begin("areas", what);
    let layers = points.first().map_or(0, |(_, values)| values.len());
    let sum = |values: &[f32], layers: usize| values.iter().take(layers).sum::<f32>();
    for layer in 0..layers {
        let mut path = String::new();
        for (index, (x, values)) in points.iter().enumerate() {
            let command = if index == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{command}{:.1} {:.1}", x * WIDTH, y(sum(values, layer + 1), end));
        }
        for (x, values) in points.iter().rev() {
            let _ = write!(path, "L{:.1} {:.1}", x * WIDTH, y(sum(values, layer), end));
        }
        let _ = write!(svg, "<path class=\"area s{layer}\" d=\"{path}Z\"/>");
    }
    svg + "</svg>"
}

/// One node's roles as a strip. The role shows in the bar's height too, not in its colour alone.
pub fn strip(what: &str, roles: &[(f32, Role)]) -> String {
    let mut svg = begin("strip", what);
    let mut at = 0;
    while let Some((from, role)) = roles.get(at) {
        let run = roles[at..].iter().take_while(|(_, r)| r == role).count();
        // Up to where the next begins; the newest one up to now.
        let to = roles.get(at + run).map_or(1.0, |(x, _)| *x);
        let (class, height) = match role {
            Role::Primary => ("primary", 100.0),
            Role::Replica => ("replica", 60.0),
            Role::Excluded => ("excluded", 30.0),
            Role::PrimaryLost | Role::Down => ("down", 18.0),
        };
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.0}\" width=\"{:.1}\" height=\"{height:.0}\"/>",
            from * WIDTH,
            HEIGHT - height,
            (to - from).max(0.001) * WIDTH,
        );
        at += run;
    }
    svg + "</svg>"
}

fn begin(class: &str, what: &str) -> String {
    let what = crate::admin::page::escape(what);
    format!(
        "<svg class=\"{class}\" viewBox=\"0 0 {WIDTH:.0} {HEIGHT:.0}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"{what}\">"
    )
}

fn y(value: f32, end: f32) -> f32 {
    HEIGHT - (value / end).clamp(0.0, 1.0) * HEIGHT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_a_round_figure_that_holds_all() {
        for (greatest, end) in
            [(0.0, 1.0), (1.0, 1.0), (1.1, 2.0), (3.0, 5.0), (5.1, 10.0), (99.0, 100.0), (1200.0, 2000.0)]
        {
            assert_eq!(axis_end(greatest, 1.0), end, "{greatest}");
        }
        assert_eq!(axis_end(f32::NAN, 1.0), 1.0);
        for greatest in 1..2000u16 {
            let greatest = f32::from(greatest) / 7.0;
            assert!((greatest..=greatest * 2.6).contains(&axis_end(greatest, 0.001)), "{greatest}");
        }
    }

    #[test]
    fn a_curve_is_broken_where_nothing_was_known() {
        let curve =
            vec![(0.0, Some(0.0)), (0.01, Some(1.0)), (0.02, None), (0.03, Some(1.0)), (0.5, Some(0.5))];
        let svg = curves("lag", &[curve], 1.0);
        assert!(svg.contains("d=\"M0.0 100.0h.1L10.0 0.0M30.0 0.0h.1M500.0 50.0h.1\""), "{svg}");
    }

    #[test]
    fn layers_lie_on_each_other() {
        let svg = areas("statements", &[(0.0, vec![1.0, 2.0]), (1.0, vec![2.0, 2.0])], 4.0);
        assert!(svg.contains("s0\" d=\"M0.0 75.0L1000.0 50.0L1000.0 100.0L0.0 100.0Z\""), "{svg}");
        assert!(svg.contains("s1\" d=\"M0.0 25.0L1000.0 0.0L1000.0 50.0L0.0 75.0Z\""), "{svg}");
    }

    #[test]
    fn a_strip_has_one_bar_a_run_and_no_hole() {
        let svg = strip("a", &[(0.5, Role::Primary), (0.6, Role::Primary), (0.75, Role::Down)]);
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(
            svg.contains("class=\"primary\" x=\"500.0\" y=\"0\" width=\"250.0\" height=\"100\""),
            "{svg}"
        );
        assert!(svg.contains("class=\"down\" x=\"750.0\" y=\"82\" width=\"250.0\" height=\"18\""), "{svg}");
    }
}
