"""Word lists of our own, from which every name and value of the built-in world is made."""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


HELD_OUT_SHARE = 8  # one name in eight is kept for the test

SHE_NAMES = listed("""
Ada Alma Anika Astrid Beata Bodil Carla Celia Clara Dagny Delia Dora Edda Elena Elin Elsa Emma Enid Erna Esme
Fanny Flora Freya Frida Gerda Greta Hanna Hedda Helga Hilda Ida Ilse Inga Irma Iris Ivana Janet Jessie Jonna Judith
Kaja Karin Katja Kirsti Laila Lena Linnea Lisbet Lotta Lucia Lydia Maja Malin Marta Matilda Mina Mira Moira Nadia
Nelly Nina Nora Norma Olga Olivia Paula Petra Ragna Rita Rosa Runa Ruth Sally Selma Signe Sigrid Silvia Siri Sofia
Solveig Stella Sunniva Svea Tanja Tekla Thea Tilda Tora Tove Ulla Ulrika Vera Vilma Viola Wanda Ylva Yrsa Zelda
""")

HE_NAMES = listed("""
Aksel Albin Anders Anton Arne Arvid Axel Bjorn Boris Bruno Casper Conrad Dag David Edgar Edvin Egil Einar Elias Emil
Erik Ernst Eskil Fabian Felix Filip Frank Fritz Georg Gilbert Gunnar Gustav Hakon Hannes Harald Henrik Holger Hugo
Igor Isak Ivar Jakob Jan Jasper Joakim Jonas Josef Kasper Kjell Klaus Knut Konrad Lars Leif Lennart Leo Ludvig Lukas
Magnus Marius Martin Mats Mikael Morten Nils Noah Odd Olaf Oskar Otto Patrik Paul Peder Per Ralf Ragnar Rasmus Robert
Roland Rolf Rune Samuel Sigurd Simon Sixten Stefan Sten Sven Tage Teodor Tobias Tom Torsten Ture Ulf Urban Valter
Verner Viktor Viggo Walter Werner Wilhelm Yngve
""")

ONSETS = listed("""
Bal Bar Ben Ber Bol Bor Bran Bren Brol Bul Cal Car Cas Cor Cran Dal Dar Del Den Dor Dral Dren Dun Fal Far Fen Fer Fos
Fral Fren Gal Gar Gel Gor Gran Gul Hal Har Hel Hin Hol Hur Jal Jar Jen Jol Jur Kal Kar Kel Kin Kol Kral Kur Lam Lan
Lar Lem Lin Lor Lun Mal Mar Mel Mer Mol Mor Mul Nal Nar Nel Nor Nul Pal Par Pel Per Pol Pral Pul Ral Ram Rel Rin Rol
Rul Sal Sar Sel Sin Sol Stal Stor Sul Tal Tar Tel Tin Tol Tran Tur Val Var Vel Vin Vol Vur Wal War Wel Win Wol Yar Yel
Zal Zar Zel Zin Zor Zul
""")

PERSON_ENDS = listed("""
ack ade aff aker ank ard ask asp ater aug eck eddy een egg emer enko erby esk ett ibb ick iddle iff igo ikov imsey
ingle irk isk itch obb ock oddy offer ogg omby onk ooper orrow osk otter ovic ubb uck uddle uff ugg umble unkel urdo
usk utter
""")

CITY_ENDS = listed("""
abad acre aford amoor amouth anda avik aville bay borough bridge burg bury by castle chester cliff dale field ford gate
ham haven holm hurst lake land minster mont mouth nes pool port sea stead ton vik wick wood worth
""")

FIRM_ENDS = listed("""
adex adyne aflex agen alux amax anix aplex atec atron avex axa ebix edra egon elco emco enta erix evia ibex icon idex
igma imex inco irox itec ivex obex odyne olex omax omnia onix ora otec otron ovex oxa ubex udex umax unix utec uxa
""")

COLLEGE_ENDS = listed("""
aby adel agate alby amere antry asham awell eby edge ely emere enbury esham ewell iby idel ilby imere inbury isham
iwell oby odge olby omere onbury osham owell
""")

FIRM_KINDS = listed("Labs Works Systems Mills Brothers Group Partners Foundry Press Trading")

MATERIALS = listed("""
copper glass paper wooden silver cotton leather rubber steel marble velvet bamboo ceramic plastic brass granite linen
amber
""")
THINGS = listed("""
kettles lamps clocks boats chairs gloves bells bottles mirrors ladders drums wheels toys candles pipes shoes ropes
bricks
""")
ROLES = listed("""
engineer painter inspector designer planner buyer analyst driver trainer editor manager mechanic teacher guide
""")
DOMAINS = listed("""
railway harbour garden bridge tunnel theatre museum forest traffic water sound colour safety market
""")
BRANCHES = listed("marine ancient modern applied tropical rural urban formal popular polar")
FIELDS = listed("botany history music law chemistry geology poetry medicine physics farming logic dance")
HOBBIES = listed("painting collecting repairing carving drawing sewing selling building flying washing")
HOBBY_THINGS = listed("kites stamps masks violins puppets quilts baskets coins radios flutes maps carts")

PLACES = listed("""
attic bakery barn cabin cellar chapel dock forge garage harbour inn library loft lounge market mill orchard pantry
parlour pier porch quarry shed stable studio tower vault workshop
""")
OBJECTS = listed("""
axe basket bell book bottle box bucket candle coat compass cup drum flute hammer hat jug kettle knife ladder lamp letter
mask mirror parcel rope scarf spoon umbrella vase whistle
""")
