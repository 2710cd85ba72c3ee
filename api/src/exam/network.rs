//! `network`: a word or a list of networks.
use std::{borrow::Cow, fmt, net::IpAddr};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, SeqAccess, Visitor},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema, schema},
};

/// What may be reached from inside an environment. Written `none`, `internet` or a list of networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// Nothing but its own loopback.
    #[default]
    None,
    /// Public addresses.
    Internet,
    /// These networks, in CIDR notation: 1 to 64, none with host bits set.
    Cidrs(Vec<String>),
}

/// Networks one exam may name: what still makes a readable policy.
const NETWORKS: usize = 64;

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_str("none"),
            Self::Internet => serializer.serialize_str("internet"),
            Self::Cidrs(networks) => networks.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;

        impl<'de> Visitor<'de> for Written {
            type Value = Network;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`none`, `internet` or a list of networks such as 10.0.0.0/8")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Network, E> {
                match text {
                    "none" => Ok(Network::None),
                    "internet" => Ok(Network::Internet),
                    other => Err(E::custom(format!(
                        "{other:?} is not one of `none`, `internet` and a list of networks"
                    ))),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Network, A::Error> {
                let mut networks = Vec::new();
                while let Some(text) = items.next_element::<String>()? {
                    if networks.len() == NETWORKS {
                        return Err(A::Error::custom(format!("more than {NETWORKS} networks")));
                    }
                    check_cidr(&text).map_err(A::Error::custom)?;
                    networks.push(text);
                }
                if networks.is_empty() {
                    return Err(A::Error::custom("an empty list: write `none`"));
                }
                Ok(Network::Cidrs(networks))
            }
        }

        deserializer.deserialize_any(Written)
    }
}

/// `address/prefix`, with nothing set behind the prefix: what is meant and what is matched are then the same.
pub(crate) fn check_cidr(text: &str) -> Result<(), String> {
    let wrong = || format!("{text:?} is not a network such as 10.0.0.0/8 or 2001:db8::/32");
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    if prefix.is_empty() || prefix.len() > 3 || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let prefix: u32 = prefix.parse().map_err(|_| wrong())?;
    let (width, bits) = match address {
        IpAddr::V4(address) => (32, u128::from(address.to_bits())),
        IpAddr::V6(address) => (128, address.to_bits()),
    };
    if prefix > width {
        return Err(format!("{text:?}: the prefix of such an address is 0 to {width}"));
    }
    let host = match width - prefix {
        128 => u128::MAX,
        free => (1_u128 << free) - 1,
    };
    if bits & host != 0 {
        return Err(format!("{text:?} has bits set behind its prefix of {prefix}"));
    }
    Ok(())
}

impl PartialSchema for Network {
    fn schema() -> RefOr<Schema> {
        let word = schema::ObjectBuilder::new()
            .schema_type(schema::Type::String)
            .enum_values(Some(["none", "internet"]))
            .build();
        let text = schema::ObjectBuilder::new().schema_type(schema::Type::String).build();
        let networks = schema::ArrayBuilder::new().items(text).build();
        schema::OneOfBuilder::new()
            .item(word)
            .item(networks)
            .description(Some("`none`, `internet`, or a list of networks in CIDR notation."))
            .into()
    }
}

impl ToSchema for Network {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("Network")
    }
}
